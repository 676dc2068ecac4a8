from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_mafa.datasets import ground_truth
from lavis_mafa.datasets.facts import TEXTS
from lavis_mafa.datasets.ground_truth import GroundTruth, SortedStrings, contradiction

NAMES = st.text("abü🐶 ", max_size=3)


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(NAMES, NAMES), max_size=20), asked=st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=20))
def test_matches_and_matrix_against_a_set(pairs: list[tuple[str, str]], asked: list[tuple[str, str]]) -> None:
    truth = GroundTruth.from_pairs(pairs)
    known = set(pairs)
    concepts = torch.tensor([truth.concept_id(concept) for _, concept in asked])
    texts = torch.tensor([truth.text_key(text) for text, _ in asked])
    assert truth.matches(concepts, texts).tolist() == [pair in known for pair in asked]
    expected = [[(text, concept) in known for text, _ in asked] for _, concept in asked]
    assert truth.matrix(concepts, texts).tolist() == expected


@given(names=st.lists(NAMES), asked=st.lists(st.one_of(st.none(), NAMES), max_size=10))
def test_sorted_strings_against_a_list(names: list[str], asked: list[str | None]) -> None:
    strings = SortedStrings(pa.chunked_array([names[:3], names[3:]], pa.string()))
    ordered = sorted(set(names))
    assert strings.values.to_pylist() == ordered
    expected = [ordered.index(name) if name in ordered else -1 for name in asked]
    assert strings.find_all(pa.chunked_array([asked], pa.string())).tolist() == expected
    assert [strings.find(name) for name in asked if name is not None] == [
        number for number, name in zip(expected, asked, strict=True) if name is not None
    ]


# names that a careless join of them would mix up
FACTS = st.sampled_from(["dog", "cat", "do", "g", "", ",", "0", "1", "0,1", "\x1f", "ü"])
LISTS = st.one_of(st.none(), st.lists(FACTS, max_size=4))


@settings(deadline=None)
@given(
    images=st.lists(LISTS, max_size=8),
    told=st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", "e"]), LISTS), max_size=8),
    cut=st.integers(0, 8),
    block=st.integers(1, 9),
)
def test_facts_against_sets(images: list[list[str] | None], told: list[tuple[str, list[str] | None]], cut: int, block: int) -> None:
    def chunked(values: list[Any], kind: pa.DataType) -> pa.ChunkedArray:
        return pa.chunked_array(
            [pa.array([[None], *values[:cut]], kind)[1:] if pa.types.is_list(kind) else values[:cut], values[cut:]], kind
        )

    texts, claims = chunked([text for text, _ in told], pa.string()), chunked([claim for _, claim in told], TEXTS)
    truth = GroundTruth.from_facts(chunked(images, TEXTS), texts, claims)
    claimed: dict[str, set[str]] = {}
    for text, claim in told:
        if claim is not None:
            claimed.setdefault(text, set()).update(claim)
    expected = [[has is not None and text in claimed and claimed[text] <= set(has) for text in "abcdefg"] for has in images]
    shuffled = [has and [*reversed(has), has[0]] for has in images]  # order and repeats mean nothing
    concepts = truth.images(pa.table({"facts": chunked(shuffled, TEXTS)}))
    assert concepts is not None and [number < 0 for number in concepts.tolist()] == [has is None for has in images]
    keys = torch.tensor([truth.text_key(text) for text in "abcdefg"])
    assert [key >= 0 for key in keys.tolist()] == [text in claimed for text in "abcdefg"]
    assert truth.matches(concepts[:, None], keys).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_truth, "PAIRS_AT_ONCE", block)
        assert truth.matrix(concepts, keys).tolist() == expected
    assert len(truth.concepts) == len({frozenset(has) for has in images if has is not None})


def test_images_that_the_truth_has_not_seen_are_unknown() -> None:
    truth = GroundTruth.from_facts(*(pa.chunked_array([part]) for part in ([["dog", "red"]], ["a dog"], [["dog"]])))
    unseen = pa.table({"facts": [["red", "dog"], ["dog"], ["dog", "red", "big"], ["big"]]})
    assert truth.images(unseen).tolist() == [0, -1, -1, -1]
    assert truth.images(pa.table({"concept": ["dog"]})) is None


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), LISTS), max_size=10), cut=st.integers(0, 10))
def test_a_contradiction_is_found_by_a_loop(rows: list[tuple[str | None, list[str] | None]], cut: int) -> None:
    names, lists = [name for name, _ in rows], [one for _, one in rows]
    first: dict[str, int] = {}
    expected = None
    for row, (name, one) in enumerate(rows):
        if name is not None and one is not None and set(one) != set(lists[first.setdefault(name, row)] or ()):
            expected = expected or (row, first[name])
    chunks = pa.chunked_array([names[:cut], names[cut:]], pa.string()), pa.chunked_array([lists[:cut], lists[cut:]], TEXTS)
    assert contradiction(*chunks) == expected


def test_numbers_lead_back_to_names_and_kinds() -> None:
    truth = GroundTruth.from_pairs([("dog", "poodle"), ("pet", "poodle"), ("pet", "cat")], kinds={"dog": "name"})
    key = truth.text_key("dog")
    assert truth.text(key) == "dog"
    assert truth.concept_name(truth.concept_id("cat")) == "cat"
    assert truth.text_kind(key) == "name"
    assert truth.text_kind(truth.text_key("pet")) is None
    assert truth.text_key("Dog") == -1 and truth.text_kind(-1) is None


def test_unknown_numbers_match_nothing() -> None:
    truth = GroundTruth.from_pairs([("a", "x"), ("b", "y")])
    # -1 * 2 + 1 would be another pair's number.
    assert not truth.matches(torch.tensor([-1, 0, -1, 1]), torch.tensor([1, -1, -1, -1])).any()


def test_from_table_takes_the_union_over_rows() -> None:
    rows = [
        {"caption": ["a pet", "a dog"], "concept": "dog"},
        {"caption": ["a pet"], "concept": "cat"},
        {"caption": ["a pet"], "concept": None},
    ]
    schema = pa.schema([("caption", pa.list_(pa.string())), ("concept", pa.string())])
    table = pa.Table.from_pylist(rows, schema)
    truth = GroundTruth.from_table(pa.concat_tables([table[:1], table[1:]]))
    assert truth is not None
    concepts = torch.tensor([truth.concept_id("dog"), truth.concept_id("cat")])
    texts = torch.tensor([truth.text_key("a pet"), truth.text_key("a dog")])
    assert truth.matrix(concepts, texts).tolist() == [[True, True], [True, False]]
    assert GroundTruth.from_table(table.select(["caption"])) is None


def test_matrix_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = GroundTruth.from_pairs([(f"t{i}", f"c{i * j % 7}") for i in range(9) for j in range(5)])
    whole = truth.matrix(torch.arange(7), torch.arange(9))
    monkeypatch.setattr(ground_truth, "PAIRS_AT_ONCE", 10)
    assert torch.equal(truth.matrix(torch.arange(7), torch.arange(9)), whole)
    assert truth.matrix(torch.arange(0), torch.arange(9)).shape == (0, 9)
    assert truth.matrix(torch.arange(3), torch.arange(0)).shape == (3, 0)


def test_the_figures_of_a_step_leave_out_what_the_truth_does_not_know() -> None:
    from lavis_mafa.tasks.pretrain import MafaPretrainTask

    task = MafaPretrainTask()
    task.truth = GroundTruth.from_pairs([("a dog", "dog"), ("a cat", "cat")])
    samples = {"concept": torch.tensor([1, 0, -1]), "text_key": torch.tensor([1, 0, -1])}
    image, text = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    verdicts = {"image_position": image, "text_position": text, "exists": image != text, "positive": torch.ones(9, dtype=torch.bool)}
    counts = {name: int(value) for name, value in task._true_counts(verdicts, samples).items()}
    assert counts == {"count_asked": 2, "count_asked_true": 0, "count_found": 2, "count_found_true": 0}
    samples["concept"][1] = 1
    assert int(task._true_counts(verdicts, samples)["count_found_true"]) == 1


def test_a_count_against_a_partial_truth_is_that_of_the_pairs_it_knows() -> None:
    from lavis_mafa.tools.count import Tally

    draw = torch.Generator().manual_seed(0)
    scores, exists, true, known = (torch.rand(40, generator=draw) if n == 0 else torch.rand(40, generator=draw) > 0.4 for n in range(4))
    partial, alone = Tally((0.5, 0.8)), Tally((0.5, 0.8))
    partial.add(scores, exists, true, known)
    alone.add(scores, exists & known, true)
    assert partial.against_truth() == alone.against_truth()
    assert int(partial.negatives.sum()) == int(exists.sum()) > int(partial.asked.sum()) > 0
