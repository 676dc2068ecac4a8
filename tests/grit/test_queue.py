"""Phases 1-3: what is collected comes out once, grouped, whatever the timing and however often the run stops."""

from __future__ import annotations

import io
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavis_mafa.grit import GritQueue, GritSampler, group_by_similarity, next_epoch_order
from lavis_mafa.grit import grouping as grouping_module
from lavis_mafa.grit import queue as queue_module
from lavis_mafa.grit.queue import HostCopy, copy_to_host, shuffle_and_group


def features(index: Tensor, epoch: int = 0, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Features that depend on the sample (and epoch) alone, as a model's would."""
    generator = torch.Generator().manual_seed(epoch)
    table = torch.randn(2, 400, dim, generator=generator)
    return table[0, index], table[1, index]


def run_epoch(queue: GritQueue, order: Tensor, batch: int, epoch: int = 0) -> Tensor:
    for index in order.split(batch):
        queue.collect(index, *features(index, epoch))
    return queue.finish_epoch()


def through_disk(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 120), st.integers(1, 25))


@settings(deadline=None)
@given(sizes, st.booleans(), st.booleans(), st.integers(0, 5))
def test_an_epoch_comes_out_as_a_permutation(size, shuffle, background, seed):
    search_space, queues, count, batch = size
    queue = GritQueue(search_space * queues, search_space, shuffle, seed, background)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for epoch in range(2):
        order = run_epoch(queue, order, batch, epoch)
        assert order.dtype == torch.int32
        assert order.sort().values.tolist() == list(range(count))
    assert queue.epoch == 2


def test_each_sub_queue_is_a_similarity_chain():
    image, text = features(torch.arange(26))
    queue = GritQueue(queue_size=16, search_space=8, example_shuffle=False)
    order = run_epoch(queue, torch.arange(26), batch=5)
    # Without shuffling the sub-queues are runs of what was collected: two full queues would be 32; 16 and a rest of 10 = 8 + 2.
    for begin, end in ((0, 8), (8, 16), (16, 24), (24, 26)):
        chain = order[begin:end] - begin
        assert torch.equal(chain, group_by_similarity(image[begin:end], text[begin:end], int(chain[0])))


def naive_chain(members: list[int], image: Tensor, text: Tensor) -> list[int]:
    """Equation 5 from the first member, each side's features looked up by the sample's number."""
    chain, left = members[:1], set(members[1:])
    while left:
        anchor, others = (image, text) if len(chain) % 2 else (text, image)
        chain.append(max(left, key=lambda sample: float(anchor[chain[-1]] @ others[sample])))
        left.remove(chain[-1])
    return chain


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 20), st.booleans(), st.sampled_from(["matrix", "rows"]))
def test_every_sub_queue_is_a_chain_of_its_own_samples_features_shuffled_or_not(search_space, queues, rest, shuffle, memory):
    count = search_space * queues + rest
    image, text = features(torch.arange(count))
    queue = GritQueue(search_space * queues, search_space, shuffle, seed=rest, memory=memory)
    order = run_epoch(queue, torch.arange(count), batch=3).tolist()
    for queue_start in range(0, count, search_space * queues):
        of_queue = order[queue_start : queue_start + search_space * queues]
        assert sorted(of_queue) == list(range(queue_start, queue_start + len(of_queue)))
        for start in range(0, len(of_queue), search_space):
            members = of_queue[start : start + search_space]
            assert members == naive_chain(members, image, text)


@pytest.mark.parametrize(("memory", "walked"), [("rows", 4), ("matrix", 0)])
def test_memory_chooses_the_way_that_is_walked(memory, walked, monkeypatch):
    """Both give the same order, so only looking tells them apart: two sub-queues of a full queue, one of the rest, and its end."""
    by_rows = []
    walk = grouping_module._walk_rows
    monkeypatch.setattr(grouping_module, "_walk_rows", lambda *rows: by_rows.append(rows) or walk(*rows))
    run_epoch(GritQueue(8, 4, memory=memory), torch.arange(14), batch=7)
    assert len(by_rows) == walked


def test_example_shuffle_mixes_the_queue_but_not_two_queues():
    order = run_epoch(GritQueue(queue_size=100, search_space=10), torch.arange(200), batch=10)
    assert sorted(order[:100].tolist()) == list(range(100))
    assert len({sample // 10 for sample in order[:10].tolist()}) > 1


def test_every_queue_of_an_epoch_is_shuffled_anew():
    image, text = features(torch.arange(30))
    queue = GritQueue(queue_size=30, search_space=10)
    for begin in (0, 30):
        queue.collect(torch.arange(begin, begin + 30), image, text)
    first, second = queue.finish_epoch().split(30)
    assert not torch.equal(first, second - 30)


@pytest.mark.parametrize("queue_size", [4, 8])
@pytest.mark.parametrize("count", [3, 4])
def test_every_position_can_start_a_chain(queue_size, count):
    starts = set()
    for seed in range(60):
        starts.add(int(run_epoch(GritQueue(queue_size, 4, example_shuffle=False, seed=seed), torch.arange(count), batch=count)[0]))
    assert starts == set(range(count))


def test_a_sample_is_collected_once_an_epoch():
    queue = GritQueue(queue_size=4, search_space=2)
    index = torch.tensor([3, 5, 3])
    queue.collect(index, *features(index))
    queue.collect(torch.tensor([5, 7]), *features(torch.tensor([5, 7])))
    assert sorted(queue.finish_epoch().tolist()) == [3, 5, 7]
    queue.collect(index, *features(index))
    assert sorted(queue.finish_epoch().tolist()) == [3, 5]


def test_large_indices_stay_exact():
    index = torch.tensor([2**24, 2**24 + 1, 2**24 + 3])
    queue = GritQueue(queue_size=2, search_space=2)
    queue.collect(index, torch.randn(3, 4), torch.randn(3, 4))
    assert sorted(queue.finish_epoch().tolist()) == index.tolist()


def test_features_are_copied_and_low_precision_is_accepted():
    image, text = (table.bfloat16() for table in features(torch.arange(12)))
    expected = GritQueue(12, 12)
    expected.collect(torch.arange(12), image.float(), text.float())
    queue, index = GritQueue(12, 12), torch.arange(12)
    queue.collect(index, image, text)
    for tensor in (index, image, text):
        tensor.zero_()
    assert torch.equal(queue.finish_epoch(), expected.finish_epoch())


def test_a_host_copy_owns_its_memory():
    source = (torch.arange(3, dtype=torch.int32), torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bfloat16), torch.arange(3))
    index, image, text, same = copy_to_host(*source).wait()
    for tensor in source:
        tensor.zero_()
    assert (index.dtype, image.dtype, text.dtype) == (torch.long, torch.float32, torch.float32)
    assert index.tolist() == same.tolist() == [0, 1, 2] and image.sum() == text.sum() == 6


def test_same_data_same_order_whatever_the_thread_does(monkeypatch):
    def orders(**settings):
        queue = GritQueue(queue_size=12, search_space=4, seed=3, **settings)
        return [run_epoch(queue, torch.arange(50), batch=7, epoch=epoch).tolist() for epoch in range(3)]

    plain = orders(background=False)
    assert plain[0] != plain[1]
    assert orders(background=True) == plain
    assert orders(background=False, memory="rows") == plain
    release = threading.Event()

    def late(*work):
        release.wait(0.01)
        return shuffle_and_group(*work)

    monkeypatch.setattr(queue_module, "shuffle_and_group", late)
    assert orders(background=True) == plain


def test_batch_size_does_not_matter():
    whole = run_epoch(GritQueue(12, 4), torch.arange(50), batch=50)
    assert torch.equal(run_epoch(GritQueue(12, 4), torch.arange(50), batch=1), whole)


def test_seed_and_epoch_matter():
    queue, other = GritQueue(20, 20, seed=0), GritQueue(20, 20, seed=1)
    first, second = (run_epoch(queue, torch.arange(20), batch=5) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(run_epoch(other, torch.arange(20), batch=5), first)


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(0, 30), st.integers(0, 1), st.booleans())
def test_resume_in_the_middle_of_an_epoch_changes_nothing(size, stop_at, stop_epoch, background):
    search_space, queues, count, batch = size
    settings_of_run = dict(queue_size=search_space * queues, search_space=search_space, seed=5, background=background)

    def run(stop: bool) -> list[list[int]]:
        queue, orders = GritQueue(**settings_of_run), []
        for epoch in range(2):
            for step, index in enumerate([*torch.arange(count).split(batch), torch.empty(0, dtype=torch.long)]):
                if stop and epoch == stop_epoch and step == min(stop_at, count // batch):
                    state = through_disk(queue.state_dict())
                    queue = GritQueue(**settings_of_run)
                    queue.collect(torch.tensor([399]), *features(torch.tensor([399])))  # dropped by loading
                    queue.load_state_dict(state)
                queue.collect(index, *features(index, epoch))
                if step:
                    for seen in (index[:1], torch.tensor([0])):  # repeats, ignored before and after the stop
                        queue.collect(seen, *features(seen, epoch))
            orders.append(queue.finish_epoch().tolist())
        return orders

    assert run(stop=True) == run(stop=False)


def test_saved_state_is_not_touched_by_going_on():
    queue = GritQueue(queue_size=6, search_space=3)
    index = torch.arange(8)
    queue.collect(index, *features(index))
    state = queue.state_dict()
    expected = queue.finish_epoch()
    run_epoch(queue, torch.arange(30), batch=4)
    again = GritQueue(queue_size=6, search_space=3)
    again.load_state_dict(state)
    assert torch.equal(again.finish_epoch(), expected)
    again.load_state_dict(state)
    assert torch.equal(again.finish_epoch(), expected)


@pytest.mark.parametrize("other", [dict(queue_size=12), dict(search_space=2), dict(seed=9), dict(example_shuffle=False)])
def test_resume_with_other_settings_is_refused(other):
    made_with = dict(queue_size=6, search_space=3, seed=0, example_shuffle=True)
    with pytest.raises(ValueError, match=f"{next(iter(other))} is .*, but the saved queue had"):
        GritQueue(**{**made_with, **other}).load_state_dict(GritQueue(**made_with).state_dict())


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_grouping_surfaces_and_stays(background):
    queue = GritQueue(queue_size=4, search_space=2, background=background)
    image, text = features(torch.arange(8))
    image[3, 0] = float("nan")
    message = "GRIT cannot group 1 samples with non-finite features; data-set indices: 3"
    with pytest.raises(ValueError, match=message):
        queue.collect(torch.arange(4), image[:4], text[:4])
        queue.finish_epoch()
    for call in (queue.finish_epoch, queue.state_dict, lambda: queue.collect(torch.arange(4, 8), image[4:], text[4:])):
        with pytest.raises(ValueError, match=message):
            call()


def test_at_most_one_full_queue_is_pending(monkeypatch):
    running, most, lock = 0, 0, threading.Lock()
    taken = []

    def watched(rows, *work):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        taken.append(sum(len(row[0]) for row in rows))
        try:
            return shuffle_and_group(rows, *work)
        finally:
            with lock:
                running -= 1

    submitted = []
    monkeypatch.setattr(queue_module, "shuffle_and_group", watched)
    queue = GritQueue(queue_size=4, search_space=2)
    submit = queue._thread.submit

    def counted(*work):
        assert all(future.done() for future in submitted)
        submitted.append(submit(*work))
        return submitted[-1]

    monkeypatch.setattr(queue._thread, "submit", counted)
    run_epoch(queue, torch.arange(42), batch=21)  # one batch fills several queues
    assert most == 1 and taken == [4] * 10 + [2]


def test_a_copy_from_the_gpu_is_waited_for_before_it_is_read(monkeypatch):
    """A stand-in for a CUDA copy: the buffers hold nonsense until the event is waited for, one call later."""

    class Event:
        def __init__(self, arrive):
            self.arrive = arrive

        def synchronize(self):
            self.arrive()

    def slow_copy(*tensors):
        source = [tensor.clone() for tensor in tensors]
        buffers = [torch.full_like(tensor, -7) for tensor in tensors]
        return HostCopy(tuple(buffers), Event(lambda: [b.copy_(s) for b, s in zip(buffers, source, strict=True)]))

    expected = run_epoch(GritQueue(12, 4), torch.arange(50), batch=7)
    monkeypatch.setattr(queue_module, "copy_to_host", slow_copy)
    queue = GritQueue(12, 4)
    for step, index in enumerate(torch.arange(50).split(7)):
        queue.collect(index, *features(index))
        if step == 3:
            assert len(queue.state_dict()["finished"]) + len(queue.state_dict()["index"]) == 28
    assert torch.equal(queue.finish_epoch(), expected)


@pytest.mark.parametrize(
    ("queue_size", "search_space", "message"),
    [
        (48000, 5000, r"search_space is 5000, but must divide queue_size \(48000\); nearest: 4800\."),
        (10, 20, r"search_space is 20, but must not exceed queue_size \(10\); nearest: 10\."),
        (10, 0, "search_space is 0, but must be at least 1"),
        (0, 0, "search_space is 0, but must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(queue_size, search_space, message):
    with pytest.raises(ValueError, match=message):
        GritQueue(queue_size, search_space)


def test_impossible_batches_are_refused():
    queue = GritQueue(4, 2)
    three = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="must be an integer tensor"):
        queue.collect(torch.zeros(3), three, three)
    with pytest.raises(ValueError, match=r"are \[2\], \[3, 2\] and \[3, 2\]"):
        queue.collect(torch.arange(2), three, three)
    with pytest.raises(ValueError, match="index -1 is negative"):
        queue.collect(torch.tensor([0, -1, 2]), three, three)
    queue.collect(torch.arange(3), three, three)
    with pytest.raises(ValueError, match="3 dimensions, but 2 earlier"):
        queue.collect(torch.arange(2), torch.zeros(2, 3), torch.zeros(2, 3))
    assert len(queue.finish_epoch()) == 3
    assert queue.finish_epoch().tolist() == []


def test_a_default_device_changes_nothing():
    """Whoever calls ``torch.set_default_device("cuda")`` gets the same orders: they are the host's business."""
    made = torch.nn.functional.normalize(torch.randn(2, 21, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    samples = torch.arange(21)

    def orders() -> list[list[int]]:
        queue, sampler = GritQueue(queue_size=12, search_space=6, background=False), GritSampler(21, 3)
        found = [list(sampler)]
        for part in samples.split(3):
            queue.collect(part, made[0, part], made[1, part])
        grouped = [queue.finish_epoch()]
        order = next_epoch_order(grouped, 21, sampler.block, batch_shuffle=True, generator_seed=1, global_batch=sampler.global_batch)
        sampler.set_order(order, 1, grouped=True)
        sampler.load_state_dict(sampler.state_dict())
        return [*found, list(sampler), grouped[0].tolist()]

    expected = orders()
    with torch.device("meta"):
        assert orders() == expected
