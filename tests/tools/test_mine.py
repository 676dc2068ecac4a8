"""Mining: which candidates become pairs, against a plain loop; what is written; stopping and going on."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lavis_mafa.datasets.annotations import image_keys, read_annotations
from lavis_mafa.datasets.facts import TEXTS
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.errors import UserError
from lavis_mafa.files import check_unfinished
from lavis_mafa.tools import mine as mining
from lavis_mafa.tools.candidates import blocks_of
from lavis_mafa.tools.mine import (
    BELOW,
    KNOWN,
    MARGIN,
    MINED,
    NO_CANDIDATE,
    OUTCOMES,
    OVER,
    OVER_ALL,
    TWICE,
    Rules,
    SourceRows,
    begin,
    choose,
    fingerprint,
    medians_of,
    pairs_table,
    plain,
)

pytestmark = pytest.mark.slow

TEXT_POOL = ["a dog", "A Dog!", "a cat", "two  cats", "Two cats.", ":)", ";)", "ein Hund", "été"]


def same_text(text: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split()) or text.lower()


def random_case(seed):
    rng = random.Random(seed)
    count = rng.randint(2, 9)
    captions = [[rng.choice(TEXT_POOL) for _ in range(rng.randint(1, 2))] for _ in range(count)]
    keys = [rng.randrange(max(1, count // 2)) for _ in range(count)]
    rows = []
    for _ in range(rng.randint(0, 25)):
        image, text = rng.randrange(-1, count), rng.randrange(count)
        p, own = rng.choice([0.1, 0.5, 0.8, 0.9, 0.95]), rng.choice([0.2, 0.9, 1.0])
        rows.append({"image": image, "text": text, "caption": rng.choice(captions[text]), "probability": p, "own_probability": own})
    return (
        rows,
        keys,
        captions,
        Rules(rng.choice([0.0, 0.5, 0.8]), rng.choice([0.0, 0.95]), rng.choice([None, 1, 2]), rng.choice([None, 1, 3])),
    )


def by_hand(rows, keys, captions, rules):
    """The rules one after the other, as a reader of their docstring would apply them."""
    outcome = [""] * len(rows)
    has = {(keys[i], same_text(c)) for i, texts in enumerate(captions) for c in texts}
    taken: dict[int, int] = {}
    for at in sorted(range(len(rows)), key=lambda r: (-rows[r]["probability"], rows[r]["image"], rows[r]["text"], r)):
        row = rows[at]
        pair = (keys[row["image"]], same_text(row["caption"])) if row["image"] >= 0 else None
        if pair is None:
            outcome[at] = NO_CANDIDATE
        elif np.float32(row["probability"]) <= rules.threshold:
            outcome[at] = BELOW
        elif np.float64(np.float32(row["probability"])) < rules.margin * np.float64(np.float32(row["own_probability"])):
            outcome[at] = MARGIN
        elif pair in has:
            outcome[at] = TWICE if pair in {(keys[i], t) for i, t in by_hand.new} else KNOWN
        else:
            has.add(pair)
            by_hand.new.append((row["image"], pair[1]))
            over = rules.per_image is not None and taken.get(pair[0], 0) >= rules.per_image
            full = rules.at_most is not None and sum(taken.values()) >= rules.at_most
            outcome[at] = OVER if over else OVER_ALL if full else MINED
            taken[pair[0]] = taken.get(pair[0], 0) + (not over and not full)
    return outcome


@pytest.mark.parametrize("seed", range(60))
def test_choosing_equals_the_loop(seed):
    rows, keys, captions, rules = random_case(seed)
    by_hand.new = []
    schema = pa.schema({"image": pa.int64(), "text": pa.int64(), "caption": pa.string()} | dict.fromkeys(PROBABILITIES, pa.float32()))
    table = pa.Table.from_pylist(rows, schema=schema)
    outcome = choose(table, np.array(keys), pa.chunked_array([pa.array(captions[:1], TEXTS), pa.array(captions[1:], TEXTS)]), rules)
    assert [OUTCOMES[o] for o in outcome] == by_hand(rows, keys, captions, rules)


PROBABILITIES = ("probability", "own_probability")


def test_texts_are_compared_by_their_words():
    assert plain(pa.chunked_array([TEXT_POOL])).to_pylist() == [same_text(t) for t in TEXT_POOL]


class Written:
    """A data set with annotations."""

    def __init__(self, pairs, captions, root="images"):
        self.table = pa.table({"image": [f"{i}.png" for i in range(len(captions))], "caption": pa.array(captions, TEXTS)})
        self.pairs, self.vis_root, self.text_processor = pairs, root, str.lower

    def __len__(self):
        return self.table.num_rows


def judge(kit, folder, count=30, size=12, stop_after=None, broken=(), monkeypatch=None):
    rows = kit.rows(count, broken=broken, batch_size=5)
    source = SourceRows(Written(rows.dataset, [[t.upper()] for t in rows.dataset.texts]))
    blocks = blocks_of(torch.arange(count), size)
    folder.mkdir(exist_ok=True)
    mining.mine_blocks(kit.encoder, rows, source, blocks, folder, batch_size=4, seed=1)
    return rows, source, *mining.read_parts(folder, len(blocks))


def test_a_row_an_anchor_with_both_probabilities(kit, tmp_path):
    rows, _, judged, bad = judge(kit, tmp_path, broken=(2, 29))
    assert judged.num_rows == 2 * 28 and [b["index"] for b in bad] == [2, 29]
    for row in judged.to_pylist():
        if min(row["image"], row["text"]) < 0:
            assert row["probability"] != row["probability"]  # NaN
        else:
            assert rows.dataset.image_keys[row["image"]] != rows.dataset.image_keys[row["text"]]
            assert 0 <= row["probability"] <= 1 and -1.001 <= row["similarity"] <= 1.001
        assert row["caption"] == (rows.dataset.texts[row["text"]].upper() if row["text"] >= 0 else None)
        anchor = row["image"] if row["direction"] == "text for image" else row["text"]
        sample = rows.dataset[anchor]
        with torch.no_grad():
            model = kit.encoder.con_d
            one, texts = torch.zeros(1, dtype=torch.long), model.text_rows([sample["text_input"]])[0]
            logits = model.match_rows(model.image_rows(sample["image"][None])[0], texts, one, one)
        assert row["own_probability"] == pytest.approx(float(logits.softmax(dim=1)[0, 1]), abs=1e-4)


def test_con_d_is_measured_on_pairs_that_the_truth_knows():
    """Twice as precise as guessing on the four known candidates, however many others it says yes to."""
    truth = GroundTruth.from_pairs([("a dog", "dog"), ("a cat", "cat")])
    dog, cat, unknown = truth.concept_id("dog"), truth.concept_id("cat"), -1
    concepts = torch.tensor([dog, cat, unknown, unknown])
    rows = [(0, 0, "a dog", 0.9), (0, 1, "a cat", 0.1), (1, 1, "a cat", 0.9), (1, 0, "a dog", 0.2)]
    rows += [(2, 0, "a dog", 0.95), (3, 1, "a cat", 0.95), (0, 2, "a tree", 0.95), (-1, 0, "a dog", float("nan"))]
    names = ("image", "text", "caption", "probability")
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    for name, values in (
        ("own_probability", [0.6] * 8),
        ("shuffled_probability", [0.1] * 8),
        ("direction", ["text for image"] * 7 + ["image for text"]),
    ):
        table = table.append_column(name, pa.array(values))
    medians = medians_of(table, 4, Rules(0.5), truth, concepts)
    assert medians.lift == pytest.approx(2.0) and medians.hardest == pytest.approx(0.9)
    assert (medians.own, medians.shuffled) == pytest.approx((0.6, 0.1)) and medians_of(table, 4, Rules(0.5)).lift is None


def test_going_on_after_a_stop_gives_the_same(kit, tmp_path, monkeypatch):
    whole = judge(kit, tmp_path / "whole")[2]
    write, written = mining.write_parquet, []

    def stop(table, path):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(table, path)

    monkeypatch.setattr(mining, "write_parquet", stop)
    with pytest.raises(KeyboardInterrupt):
        judge(kit, tmp_path / "stopped")
    monkeypatch.setattr(mining, "write_parquet", lambda table, path: (written.append(path), write(table, path)))
    resumed = judge(kit, tmp_path / "stopped")[2]
    assert resumed.equals(whole) and len(written) == len(set(written)) == 3


def test_a_pass_is_not_gone_on_with_when_a_caption_or_an_image_path_has_changed(kit, tmp_path):
    keys = torch.tensor([0, 1])

    def begun(images: list[str], captions: list[list[str]], keys: torch.Tensor = keys, settings: str = "") -> bool:
        table = pa.table({"image": images, "caption": captions})
        data = [kit.Table(table.slice(0, 1)), kit.Table(table.slice(1))]
        return begin(tmp_path / "out", {"data": fingerprint(torch.utils.data.ConcatDataset(data), keys, settings)}, "mine.json")

    assert not begun(["a", "b"], [["one"], ["two"]]) and begun(["a", "b"], [["one"], ["two"]])
    for images, captions in ((["a", "c"], [["one"], ["two"]]), (["a", "b"], [["one"], ["tow"]]), (["a", "b"], [["one"], ["two", "2"]])):
        with pytest.raises(UserError, match="was begun with data of 2 rows, fingerprint .*, not of 2 rows, fingerprint"):
            begun(images, captions)
    for keys, settings in ((torch.tensor([0, 0]), ""), (torch.tensor([0, 1]), "other")):
        with pytest.raises(UserError, match="was begun with data"):
            begun(["a", "b"], [["one"], ["two"]], keys, settings)


def test_ranks_share_the_blocks(kit, tmp_path, monkeypatch):
    whole, write = judge(kit, tmp_path / "whole")[2], mining.write_parquet
    written: list[list[str]] = []

    def watched(table, path):
        written[-1].append(path.name)
        write(table, path)

    monkeypatch.setattr(mining, "write_parquet", watched)
    monkeypatch.setattr(mining, "world_size", lambda: 2)
    (tmp_path / "shared").mkdir()
    rows = kit.rows(30, batch_size=5)
    source = SourceRows(Written(rows.dataset, [[t.upper()] for t in rows.dataset.texts]))
    for me in (0, 1):  # as if at once: neither sees what the other wrote
        written.append([])
        monkeypatch.setattr(mining, "rank", lambda me=me: me)
        folder = tmp_path / f"rank_{me}"
        folder.mkdir()
        mining.mine_blocks(kit.encoder, rows, source, blocks_of(torch.arange(30), 12), folder, batch_size=4, seed=1)
        for name in written[-1]:
            (folder / name).rename(tmp_path / "shared" / name)
    assert sorted(map(sorted, written)) == [["block_000000.parquet", "block_000002.parquet"], ["block_000001.parquet"]]
    assert mining.read_parts(tmp_path / "shared", 3)[0].equals(whole)


def test_the_pairs_are_read_back_with_images_that_keep_their_captions_together(kit, tmp_path):
    rows, source, judged, _ = judge(kit, tmp_path / "blocks")
    keys = rows.image_keys.numpy()
    outcome = choose(judged, keys, source.table["caption"], Rules(threshold=float(np.median(judged["probability"]))))
    mined = np.flatnonzero(outcome == 0)
    assert len(mined) > 0
    table = pairs_table(source, keys, judged, mined)
    pq.write_table(table, tmp_path / "pairs.parquet")
    back = read_annotations([tmp_path / "pairs.parquet"])
    assert back.num_rows == 30 + len(mined)
    originals, new = table.slice(0, 30).to_pylist(), table.slice(30).to_pylist()
    assert all(row["source"] == "original" and row["image_sample"] == row["text_sample"] == i for i, row in enumerate(originals))
    assert [row["score"] for row in new] == sorted((row["score"] for row in new), reverse=True)
    pairs = {(row["image_id"], same_text(row["caption"])) for row in originals}
    for row in new:
        assert row["source"] == "mined" and row["image"] == f"{row['image_sample']}.png"
        assert row["caption"] == rows.dataset.texts[row["text_sample"]].upper()
        assert (row["image_id"], same_text(row["caption"])) not in pairs  # each once, and none twice
        pairs.add((row["image_id"], same_text(row["caption"])))
    assert image_keys(back).tolist() == [row["image_id"] for row in originals + new]


def test_several_captions_a_row_stay_lists_and_the_drawn_one_is_found():
    data = Written(None, [["A dog", "The DOG"], ["a cat"]])
    source = SourceRows(data)
    assert source.caption(0, "the dog") == "The DOG" and source.caption(1, "anything") == "a cat"
    judged = pa.table(
        {
            "direction": ["text for image", "image for text"],
            "image": [1, -1],
            "text": [0, 0],
            "caption": ["The DOG", ""],
            "probability": pa.array([0.9, None], pa.float32()),
            "own_probability": pa.array([0.7, 0.6], pa.float32()),
        }
    )
    table = pairs_table(source, np.array([0, 1]), judged, np.array([0]))
    assert table["caption"].to_pylist() == [["A dog", "The DOG"], ["a cat"], ["The DOG"]]
    assert table["score"].to_pylist() == pytest.approx([0.6, 0.7, 0.9])


def with_facts(captions, facts, claims, root="images"):
    data = Written(None, captions, root)
    data.table = data.table.append_column("facts", pa.array(facts, TEXTS))
    data.table = data.table.append_column("caption_facts", pa.array(claims, pa.list_(TEXTS)))
    return data


@pytest.mark.parametrize("several", [True, False])
def test_a_mined_row_has_the_facts_of_its_image_and_the_claims_of_its_text(several, tmp_path):
    captions, claims = [["a dog"], ["a thing"], ["a cat", "a dog"][: 1 + several]], [[None], None, [["cat"], ["dog"]][: 1 + several]]
    facts = [["dog", "red"], None, ["cat"]]
    mined = [(0, 2, "a cat"), (2, 0, "a dog"), (1, 2, "a cat"), (0, 1, "a thing")]
    columns = {name: [pair[place] for pair in mined] for place, name in enumerate(("image", "text", "caption"))}
    columns |= {"probability": pa.array([0.9, 0.8, 0.7, 0.6], pa.float32()), "own_probability": pa.array([0.7] * 4, pa.float32())}
    judged = pa.table({"direction": ["text for image"] * 4, **columns})
    pq.write_table(
        pairs_table(SourceRows(with_facts(captions, facts, claims)), np.arange(3), judged, np.arange(4)), tmp_path / "a.parquet"
    )
    back = read_annotations([tmp_path / "a.parquet"])
    assert back["facts"].to_pylist() == [*facts, facts[0], facts[2], None, facts[0]]
    known = {"a cat": ["cat"], "a dog": ["dog"] if several else None, "a thing": None}
    assert back["caption_facts"].to_pylist()[3:] == [[known[text]] for _, _, text in mined]
    truth, sole = GroundTruth.from_table(back), GroundTruth.from_table(SourceRows(with_facts(captions, facts, claims)).table)
    assert truth.texts.values == sole.texts.values and truth.concepts.values == sole.concepts.values


def test_data_sets_whose_claims_differ_are_refused_before_they_are_mined_together():
    class Both:
        datasets = [with_facts([["a dog"]], [["dog"]], [[[name]]]) for name in ("dog", "cat")]

    with pytest.raises(
        UserError, match=r"data set 2, row 1: 'caption_facts' of caption 'a dog' are \[\"cat\"\], but \[\"dog\"\] in data"
    ):
        SourceRows(Both())


def test_data_sets_in_two_folders_get_absolute_paths(tmp_path):
    class Both:
        datasets = [Written(None, [["a"]], tmp_path / "one"), Written(None, [["b"]], tmp_path / "two")]

    source = SourceRows(Both())
    assert source.root is None
    assert source.table["image"].to_pylist() == [f"{tmp_path}/one/0.png", f"{tmp_path}/two/0.png"]


def test_lavis_annotations_are_a_source_and_others_are_refused():
    class Lavis:
        annotation = [{"image": "1.jpg", "caption": "a", "instance_id": "0"}, {"image": "2.jpg", "caption": "b"}]
        vis_root, text_processor = "images", str

        def __len__(self):
            return 2

    assert SourceRows(Lavis()).table["caption"].to_pylist() == [["a"], ["b"]]
    Lavis.annotation = [{"question": "a"}] * 2
    with pytest.raises(UserError, match="the data set Lavis keeps no list of images and captions"):
        SourceRows(Lavis())


def test_a_folder_is_gone_on_with_only_under_the_same_settings(tmp_path):
    folder = tmp_path / "mine"
    assert begin(folder, {"seed": 1, "batch_size": 4}, "mine.json") is False
    assert begin(folder, {"seed": 1, "batch_size": 4}, "mine.json") is True
    with pytest.raises(UserError, match="was begun with batch_size 4, not 8"):
        begin(folder, {"seed": 1, "batch_size": 8}, "mine.json")
    (folder / "mine.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="finished result"):
        begin(folder, {"seed": 1, "batch_size": 4}, "mine.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="files of something else"):
        check_unfinished(tmp_path / "other", "mine.json")
    with pytest.raises(UserError, match="but that is a file"):
        check_unfinished(tmp_path / "other" / "thesis.tex", "mine.json")
