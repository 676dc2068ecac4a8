"""Counting against a plain loop over pairs, and what must hold whatever the numbers are."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch

import reduced
from lavis_mafa.errors import UserError
from lavis_mafa.grit import group_by_similarity
from lavis_mafa.models.vit import resize_images
from lavis_mafa.objectives.mining import best_query
from lavis_mafa.tools import count as counting
from lavis_mafa.tools.candidates import (
    Encoder,
    Known,
    batches_of,
    blocks_of,
    encoded_blocks,
    grouped_order,
    hardest_negatives,
    match_probabilities,
    shuffled,
    shuffled_pairs,
)
from lavis_mafa.tools.count import Sampling, Tally, count_false_negatives, samplings

pytestmark = pytest.mark.slow

THRESHOLDS = (0.4, 0.6)
ONE = torch.zeros(1, dtype=torch.long)


@cache
def encoded(model, data):
    """Images and texts one at a time: (states, features) each."""
    with torch.no_grad():
        return [model.image_rows(data.images[i : i + 1]) for i in range(len(data))], [model.text_rows([t]) for t in data.texts]


def scored(model, data, pairs):
    """Con-D's probability of (image, text) pairs, one at a time."""
    images, texts = encoded(model, data)
    with torch.no_grad():
        return [float(model.match_rows(images[i][0], texts[t][0], ONE, ONE).softmax(dim=1)[0, 1]) for i, t in pairs]


def one_by_one(model, miner, data, batches, known):
    """(direction, probability, truly matches) of every anchor's hardest negative, a pair at a time; None where there is none."""
    found = []
    images, texts = encoded(model, data)
    mined_images, mined_texts = encoded(miner, data)

    def alike(i, t):
        return float(best_query(mined_images[i][1], mined_texts[t][1]))

    def matches(r, anchor):
        same_image, same_text = data.image_keys[r] == data.image_keys[anchor], data.texts[r] == data.texts[anchor]
        return r == anchor or (known.same_image and same_image) or (known.same_text and same_text)

    for rows in batches:
        for anchor in rows:
            others = [r for r in rows if not matches(r, anchor)]
            for direction in (0, 1):
                if not others:
                    found.append((direction, None, None))
                    continue
                ranked = max(others, key=lambda r: alike(anchor, r) if direction == 0 else alike(r, anchor))  # noqa: B023
                i, t = (anchor, ranked) if direction == 0 else (ranked, anchor)
                with torch.no_grad():
                    p = float(model.match_rows(images[i][0], texts[t][0], ONE, ONE).softmax(dim=1)[0, 1])
                found.append(
                    (direction, p, bool(data.truth.matches(data.concepts[i], torch.tensor(data.truth.text_key(data.texts[t])))))
                )
    return found


def dividing(encoder, rows):
    """Two thresholds in wide gaps of the probabilities of all pairs, so that rounding cannot move a pair across."""
    (block,) = encoded_blocks(encoder, rows, blocks_of(torch.arange(len(rows)), len(rows)))
    everyone = torch.arange(len(rows))
    scores = match_probabilities(encoder, block, everyone.repeat_interleave(len(rows)), everyone.repeat(len(rows))).unique()
    middle = scores[len(scores) // 5 : -len(scores) // 5]
    assert middle[-1] - middle[0] > 0.001, "Con-D has no opinion"
    widest = middle.diff().topk(2).indices
    return tuple(sorted(((middle[widest] + middle[widest + 1]) / 2).tolist()))


def slices(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize(
    ("arch", "miner", "known"),
    [
        ("albef_mafa", None, Known()),
        ("blip2_mafa", None, Known(same_image=False, same_text=True)),
        ("blip2_mafa", "albef_mafa", Known(same_image=False)),
        ("albef_mafa", "blip2_mafa", Known(same_text=True)),
    ],
)
def test_counts_equal_a_loop_over_pairs(kit, models, arch, miner, known):
    rows, encoder = kit.rows(23, batch_size=5), kit.encoder_of(models[arch])
    encoder.miner = models.get(miner)
    data, order, seed = rows.dataset, shuffled(23, 5), 5
    ways = samplings([3, 8], [8, 12])  # a batch of 3 would cross the parts of M = 8
    thresholds = dividing(encoder, rows)
    seen = []
    count = count_false_negatives(encoder, rows, order, ways, thresholds, seed, known, look=seen.append)
    assert [early.samples for early in seen] == [12]
    assert list(count.tallies) == ways and count.samples == 23 and count.truth_known
    for way, tally in count.tallies.items():
        batches = []
        for block in encoded_blocks(encoder, rows, blocks_of(order, 12)):
            for part in slices(list(range(len(block))), way.search_space or 12):
                grouped = part if way.search_space is None else grouped_order(block, way.search_space, seed)[part].tolist()
                batches += [block.index[batch].tolist() for batch in slices(grouped, way.batch_size)]
        found = one_by_one(models[arch], models[miner or arch], data, batches, known)
        hardest = torch.tensor([p for _, p, _ in found if p is not None])
        assert count.medians(way).hardest == pytest.approx(float(hardest.median()), abs=2e-4)
        for side in (0, 1):
            mine = [(p, true) for direction, p, true in found if direction == side and p is not None]
            assert int(tally.negatives[side]) == len(mine) and int(tally.negatives[side] + tally.lonely[side]) == 23
            assert tally.false[side].tolist() == [sum(p > t for p, _ in mine) for t in thresholds]
            assert int(tally.true[side]) == sum(true for _, true in mine)
            assert tally.both[side].tolist() == [sum(p > t and true for p, true in mine) for t in thresholds]
        everything = [(p, true) for _, p, true in found if p is not None]
        assert int(tally.judged.sum()) == len(everything)
        assert tally.squared_error == pytest.approx(sum((p - true) ** 2 for p, true in everything), abs=1e-4)
        assert tally.against_truth()["brier"] == pytest.approx(tally.squared_error / len(everything))
    own = scored(models[arch], data, [(i, i) for i in range(23)])
    assert count.own.median() == pytest.approx(float(torch.tensor(own).median()), abs=2e-4)
    parts = [part.tolist() for part in order.split(12)]
    after = [(i, t) for part in parts for i, t in zip(part, part[1:] + part[:1], strict=True)]
    after = [(i, t) for i, t in after if data.image_keys[i] != data.image_keys[t] and data.texts[i] != data.texts[t]]
    assert count.shuffled.median() == pytest.approx(float(torch.tensor(scored(models[arch], data, after)).median()), abs=2e-4)
    assert any(0 < int(t.false[0, 0]) < int(t.negatives[0]) for t in count.tallies.values()), "the test compares nothing but zeros"


def test_grouping_stays_in_its_part_and_is_grits(kit):
    (block,) = encoded_blocks(kit.encoder, kit.rows(21), blocks_of(torch.arange(21), 21))
    order = grouped_order(block, 8, seed=1)
    for rows in torch.arange(21).split(8):
        part = order[rows]
        assert sorted(part.tolist()) == rows.tolist()
        start = int(part[0] - rows[0])
        assert torch.equal(rows[group_by_similarity(block.image_features[rows], block.text_features[rows], start)], part)
    assert not torch.equal(order, grouped_order(block, 8, seed=2))
    assert not torch.equal(order, grouped_order(dataclasses.replace(block, number=1), 8, seed=1)), "each block starts anew"
    queries = torch.stack([-block.text_features, block.image_features], dim=1)
    assert torch.equal(order, grouped_order(dataclasses.replace(block, image_features=queries), 8, seed=1)), (
        "the query most like its text"
    )
    assert [len(b) for b in batches_of(order, 5, 8)] == [5, 3, 5, 3, 5]


def test_known_positives_are_never_mined_and_all_anchors_are_there(kit):
    (block,) = encoded_blocks(kit.encoder, kit.rows(20, per_image=4), blocks_of(torch.arange(20), 20))
    found = hardest_negatives(block, batches_of(torch.randperm(20), 6))
    keys = block.image_key
    assert bool((keys[found.image] != keys[found.text])[found.exists].all())
    assert torch.equal(found.image[:20][found.exists[:20]], torch.arange(20)[found.exists[:20]])
    assert torch.equal(found.text[20:][found.exists[20:]], torch.arange(20)[found.exists[20:]])
    alone = hardest_negatives(block, [torch.arange(20).split(4)[0], torch.arange(4, 20)])
    assert not alone.exists[:4].any() and alone.exists[4:20].all()


def test_a_block_is_the_same_in_any_pieces(kit):
    once, pieces = (next(encoded_blocks(kit.encoder, kit.rows(9, batch_size=size), blocks_of(torch.arange(9), 9))) for size in (9, 2))
    assert torch.allclose(once.images, pieces.images, atol=1e-5) and once.captions == pieces.captions
    image, text = torch.randint(9, (40,)), torch.randint(9, (40,))
    scores = [match_probabilities(kit.encoder, block, image, text, size) for block, size in ((once, 512), (pieces, 3))]
    assert torch.allclose(*scores, atol=1e-5)


def test_half_precision_keeps_states_small_and_features_whole(kit, con_d):
    encoder = kit.encoder_of(con_d, "bf16")
    (block,) = encoded_blocks(encoder, kit.rows(6), blocks_of(torch.arange(6), 6))
    assert block.images.dtype == block.texts[0].dtype == torch.bfloat16
    assert block.image_features.dtype == block.text_features.dtype == torch.float32
    assert match_probabilities(encoder, block, torch.arange(6), torch.arange(6)).dtype == torch.float32


def test_unreadable_samples_are_left_out_and_counted(kit):
    rows = kit.rows(12, broken=(3, 4, 5, 11), batch_size=3)
    told = []
    count = count_false_negatives(kit.encoder, rows, torch.arange(12), samplings([3], [3]), (0.5,), progress=told.append)
    assert count.samples == 8 and count.unreadable == {"OSError": 4} and sum(told) == 12
    assert all(int(t.negatives.sum() + t.lonely.sum()) == 16 for t in count.tallies.values())


def test_data_smaller_than_a_batch_are_one_batch(kit):
    ways = samplings([64], [128])
    count = count_false_negatives(kit.encoder, kit.rows(7), torch.arange(7), ways, (0.5,))
    assert [t.negatives.tolist() for t in count.tallies.values()] == [[7, 7], [7, 7]]


def test_a_con_d_that_says_nan_names_the_samples(kit, con_d, monkeypatch):
    nan = torch.full((1,), float("nan"))
    (block,) = encoded_blocks(kit.encoder, kit.rows(4), blocks_of(torch.arange(4), 4))
    monkeypatch.setattr(con_d, "match_rows", lambda states, texts, image, text: nan.expand(len(image), 2))
    with pytest.raises(UserError, match="image 1, text 2"):
        match_probabilities(kit.encoder, block, torch.tensor([1]), torch.tensor([2]))
    monkeypatch.setattr(con_d, "image_rows", lambda image: (image.flatten(2), nan.expand(len(image), 8)))
    with pytest.raises(UserError, match="4 samples; data set rows: 0, 1, 2, 3"):
        list(encoded_blocks(kit.encoder, kit.rows(4), blocks_of(torch.arange(4), 4)))


def test_tallies_of_two_ranks_are_the_tally_of_all():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 2, 30, generator=generator)
    exists, true = (torch.rand(2, 2, 30, generator=generator) > 0.3 for _ in range(2))
    one, other, both = (Tally(THRESHOLDS) for _ in range(3))
    one.add(scores[0].flatten(), exists[0].flatten(), true[0].flatten())
    other.add(scores[1].flatten(), exists[1].flatten(), true[1].flatten())
    both.add(*(torch.cat([x[0], x[1]], dim=1).flatten() for x in (scores, exists, true)))
    one.merge(other)
    assert one.counts() == both.counts()
    assert one.against_truth()["brier"] == pytest.approx(both.against_truth()["brier"])
    assert [b["pairs"] for b in one.against_truth()["calibration"]] == both.judged.tolist()
    assert one.counts(0.83)[0]["wrt_image"] == pytest.approx(0.83 * int(one.false[0, 0]))


def test_what_is_known_to_match(kit):
    """By image, by text (white space aside), and which texts a shuffle leaves out."""
    (block,) = encoded_blocks(kit.encoder, kit.rows(5), blocks_of(torch.arange(5), 5))
    keys, texts = torch.tensor([0, 1, 2, 2, 0]), ["a dog", "a cat", "a cat", "a  dog", "a cow"]
    block = dataclasses.replace(block, image_key=keys, captions=texts)
    by_image, by_text = Known(same_image=True).keys(block), Known(same_image=False, same_text=True).keys(block)
    assert torch.equal(by_image[0], keys) and len(by_image) == len(by_text) == 1 and len(Known(True, True).keys(block)) == 2
    same = (by_text[0][:, None] == by_text[0]).int().tolist()
    assert same == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    image, text = shuffled_pairs(block)  # not 1 -> 2 (same text), not 2 -> 3 (same image), not 4 -> 0 (same image)
    assert image.tolist() == [0, 3] and text.tolist() == [1, 4]


def test_a_threshold_itself_is_no_match():
    tally = Tally((0.5, 0.75))
    tally.add(torch.tensor([0.5, 0.75, 0.76, 0.9]), torch.tensor([True, True, True, False]))
    assert tally.false.tolist() == [[1, 0], [1, 1]] and tally.negatives.tolist() == [2, 1] and tally.lonely.tolist() == [0, 1]


def test_calibration_is_that_of_its_bins():
    """Mean probability and share of true matches bin by bin, and the error that they add up to."""
    generator = torch.Generator().manual_seed(0)
    scores, true = torch.rand(200, generator=generator), torch.rand(200, generator=generator) > 0.4
    exists = torch.rand(200, generator=generator) > 0.2
    tally = Tally((0.5,))
    tally.add(scores, exists, true)
    bins = [
        [(float(p), bool(t)) for p, t, e in zip(scores, true, exists, strict=True) if e and k <= 10 * float(p) < k + 1]
        for k in range(10)
    ]
    found = tally.against_truth()
    for pairs, one in zip(bins, found["calibration"], strict=True):
        assert one["pairs"] == len(pairs)
        assert one["mean_probability"] == pytest.approx(sum(p for p, _ in pairs) / len(pairs))
        assert one["true_share"] == pytest.approx(sum(t for _, t in pairs) / len(pairs))
    error = sum(abs(sum(p for p, _ in pairs) - sum(t for _, t in pairs)) for pairs in bins) / int(exists.sum())
    assert found["calibration_error"] == pytest.approx(error)
    assert found["true"] == {"image": int((true & exists)[:100].sum()), "text": int((true & exists)[100:].sum())}


@pytest.mark.parametrize("arch", ["albef_mafa", "blip2_mafa"])
def test_a_candidates_similarity_is_its_cosine(kit, models, arch):
    (block,) = encoded_blocks(kit.encoder_of(models[arch]), kit.rows(14), blocks_of(torch.arange(14), 14))
    found = hardest_negatives(block, batches_of(torch.randperm(14, generator=torch.Generator().manual_seed(0)), 7))
    cosines = best_query(block.image_features, block.text_features)
    assert found.exists.any() and len(found) == 28
    torch.testing.assert_close(found.similarity[found.exists], cosines[found.image, found.text][found.exists])


def test_ranks_share_the_blocks_and_add_up(kit, monkeypatch):
    """Two and three ranks, one after the other in this process, count what one counts; each reads its own blocks alone."""

    def run():
        read: list[int] = []
        rows = kit.rows(23, broken=(4,), batch_size=4)
        count = count_false_negatives(kit.encoder, rows, shuffled(23, 5), samplings([4], [6]), (0.4,), 5, progress=read.append)
        return count, sum(read)

    def plain(count):
        tallies = [(t.false.tolist(), t.negatives.tolist(), t.both.tolist(), t.scores.counts.tolist()) for t in count.tallies.values()]
        return tallies, count.samples, count.unreadable, count.own.counts.tolist(), count.shuffled.counts.tolist()

    alone, read_by_one = run()
    for world in (2, 3):
        monkeypatch.setattr(counting, "world_size", lambda world=world: world)
        handed: list[list] = []
        for me in range(world):  # first what each hands over, then what each makes of all
            mine: list = []
            monkeypatch.setattr(counting, "rank", lambda me=me: me)
            monkeypatch.setattr(counting, "gather_objects", lambda own, mine=mine: (mine.append(copy.deepcopy(own)), [own])[1])
            run()
            handed.append(mine)
        shares = []
        for me in range(world):
            turns = iter(zip(*handed, strict=True))
            monkeypatch.setattr(counting, "rank", lambda me=me: me)
            monkeypatch.setattr(counting, "gather_objects", lambda own, turns=turns: list(next(turns)))
            count, read = run()
            assert plain(count) == plain(alone)
            shares.append(read)
        assert sum(shares) == read_by_one == 23 and max(shares) < 23


def test_the_order_of_ways():
    assert samplings([8, 4, 8], [12]) == [Sampling(4), Sampling(8), Sampling(4, 12), Sampling(8, 12)]
    assert torch.equal(shuffled(10, 3, 4), shuffled(10, 3)[:4]) and sorted(shuffled(10, 3).tolist()) == list(range(10))


def test_a_con_d_of_another_size_than_the_miner_sees_resized_images():
    con_d, miner, samples = reduced.ours(image_encoder={"image_size": 16}), reduced.ours(1), reduced.batch(4)
    encoder = Encoder(con_d, torch.device("cpu"), miner=miner)
    states, _, features, _ = encoder.rows(samples["image"], samples["text_input"], torch.arange(4))
    with torch.no_grad():
        assert torch.equal(states, con_d.image_states(resize_images(samples["image"], 16)))
        assert torch.equal(features, miner.image_rows(samples["image"])[1])
