"""Tar shards, tables with image bytes and streams of grouped batches, from the command line to training."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.config.data import AnnotationFile, own_files
from lavis_mafa.datasets.annotations import image_keys, read_annotations
from lavis_mafa.datasets.fingerprint import fingerprints
from lavis_mafa.datasets.indexed import IndexedDataset, image_path
from lavis_mafa.datasets.pairs import ImageTextPairs, RetrievalPairs
from lavis_mafa.datasets.stored import PLACE, check_shards, image_source
from lavis_mafa.grit import GritQueue, GritSampler, next_epoch_order
from lavis_mafa.runners.loading import unreadable
from lavis_mafa.tools.gallery import Thumbnails
from lavis_mafa.tools.mine import SourceRows, pairs_table
from shard_files import COUNT, caption, jpeg, write_files, write_shards, write_tar


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same pairs as files, as shards with an index, and packed."""
    folder = tmp_path_factory.mktemp("data")
    write_files(folder)
    write_shards(folder / "tars")
    pattern = str(folder / "tars/{00000..00004}.tar")
    assert main(["index-shards", pattern, "--output", str(folder / "index.arrow")]) == 0
    assert main(["pack", str(folder / "pairs.jsonl"), "--images", str(folder / "images"), "--output", str(folder / "pack.arrow")]) == 0
    return folder


def table_with_bytes(**columns):
    images = [{"bytes": jpeg(number), "path": f"{number % 2}.jpg"} for number in range(4)]
    return pa.table({"image": images, "text": [caption(number) for number in range(4)], **columns})


def contents(root, table):
    """What is read of each row, in a random order."""
    rows = np.random.default_rng(0).permutation(len(table)).tolist()
    found = {row: image_source(root, table, row).read_bytes() for row in rows}
    return [found[row] for row in range(len(table))]


def losses(folder):
    lines = map(json.loads, (next(folder.glob("2*")) / "metrics.jsonl").read_text().splitlines())
    return [[line[name] for name in sorted(line) if "loss" in name] for line in lines]


# --- what is read -------------------------------------------------------------------------------------------------------


def test_each_row_of_an_index_and_of_a_pack_has_its_own_bytes(data):
    for name, root in (("index.arrow", data / "tars"), ("pack.arrow", data / "nowhere")):
        table = read_annotations([data / name])
        assert contents(root, table) == [jpeg(number) for number in range(COUNT)]
        assert table["caption"].to_pylist() == [[caption(number)] for number in range(COUNT)]
    assert read_annotations([data / "index.arrow"])["image"][5].as_py() == "00001.tar/000000005.jpg"


def test_captions_come_from_a_key_of_the_json_where_one_is_named(data, tmp_path):
    assert main(["index-shards", str(data / "tars/*.tar"), "--caption-key", "caption", "--output", str(tmp_path / "a.arrow")]) == 0
    assert read_annotations([tmp_path / "a.arrow"])["caption"][7].as_py() == [f"{caption(7)}, says the JSON"]


def test_training_is_the_same_to_the_bit_from_files_shards_and_a_pack(data, tmp_path, run_of):
    (tmp_path / "run.yaml").write_text(run_of(data))
    train, found = "datasets.grit_pairs.build_info.annotations.train.storage", {}
    images = "datasets.grit_pairs.build_info.images.storage"
    for name, root, workers in (("pairs.jsonl", "images", 0), ("index.arrow", "tars", 2), ("pack.arrow", None, 0)):
        options = ["model.ecm.enabled=false", "model.discriminator=null", f"run.num_workers={workers}"]
        options += [f"run.output_dir={tmp_path / name}", f"{train}={data / name}", f"{images}={data / root if root else 'null'}"]
        assert main(["train", "--cfg-path", str(tmp_path / "run.yaml"), "--options", *options]) == 0
        found[name] = losses(tmp_path / name)
    first, *others = found.values()
    assert len(first) == 2 * COUNT // 4 and any(map(any, first))
    assert others == [first, first]


def test_check_data_finds_torn_images_in_shards_and_leaves_them_out(data, tmp_path, capsys):
    members = {f"{n}.{kind}": content for n in range(3) for kind, content in (("jpg", jpeg(n)), ("txt", caption(n).encode()))}
    write_tar(tmp_path / "a.tar", {**members, "1.jpg": jpeg(1)[:200]})
    assert main(["index-shards", str(tmp_path / "a.tar"), "--output", str(tmp_path / "a.arrow")]) == 0
    clean = tmp_path / "clean.arrow"
    arguments = ["--annotations", tmp_path / "a.arrow", data / "pack.arrow", "--images", tmp_path, "--output", tmp_path / "check"]
    assert main(["check-data", *map(str, [*arguments, "--workers", 0, "--clean", clean, "--allow-absolute-paths"])]) == 1
    assert "a.tar/1.jpg" in (tmp_path / "check/problems.jsonl").read_text()
    table = read_annotations([clean], allow_absolute_paths=True)
    good = [0, 2, *range(COUNT)]
    assert contents(tmp_path, table) == [jpeg(n) for n in good] and table["shard"][0].as_py() == "a.tar"


def test_a_pack_in_the_image_folder_is_cleaned_to_an_index_of_it(data, tmp_path):
    arguments = ["--annotations", data / "pack.arrow", "--output", tmp_path / "check", "--workers", 0]
    assert main(["check-data", *map(str, [*arguments, "--clean", tmp_path / "clean.arrow"])]) == 0
    table = read_annotations([tmp_path / "clean.arrow"])  # no path leaves the folder
    assert contents(data, table) == [jpeg(number) for number in range(COUNT)]


# --- tables with image bytes --------------------------------------------------------------------------------------------


def test_images_of_one_path_are_one_if_their_bytes_are(tmp_path):
    images = [{"bytes": jpeg(0), "path": "a.jpg"}, {"bytes": jpeg(1), "path": "a.jpg"}, {"bytes": jpeg(0), "path": "a.jpg"}]
    pq.write_table(pa.table({"image": images, "caption": ["one", "two", ["three"][0]]}), tmp_path / "a.parquet")
    assert main(["pack", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "a.arrow")]) == 0
    table = read_annotations([tmp_path / "a.arrow"])
    assert image_keys(table).tolist() == [0, 1, 0]
    assert contents(tmp_path, table) == [jpeg(0), jpeg(1), jpeg(0)]
    assert table["offset"][0] == table["offset"][2]  # written once


def test_images_of_several_files_are_told_apart_whatever_they_are_called(tmp_path, capsys):
    """Two packs, a pack of both, and check-data: each caption has the image of its own file, though all are called 1.jpg."""
    for number, name in enumerate("ab"):
        images = [{"bytes": jpeg(number), "path": "1.jpg"}] * 2
        pq.write_table(pa.table({"image": images, "caption": [f"{name} one", f"{name} two"]}), tmp_path / f"{name}.parquet")
        assert main(["pack", str(tmp_path / f"{name}.parquet"), "--output", str(tmp_path / f"{name}.arrow")]) == 0
    both = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    assert main(["pack", *map(str, both), "--output", str(tmp_path / "both.arrow")]) == 0
    for files in (both, [tmp_path / "both.arrow"]):
        table = read_annotations(files)
        assert contents(tmp_path, table) == [jpeg(0), jpeg(0), jpeg(1), jpeg(1)] and image_keys(table).tolist() == [0, 0, 1, 1]
    assert main(["check-data", "--annotations", *map(str, both), "--output", str(tmp_path / "check"), "--workers", "0"]) == 0
    assert json.loads((tmp_path / "check/check.json").read_text())["images"] == 2


def test_a_folder_that_hugging_face_saved_is_read_as_it_is(tmp_path):
    """Its streams have the same columns, uncompressed: nothing has to be packed."""
    (tmp_path / "saved").mkdir()
    table = table_with_bytes().rename_columns({"text": "caption"})
    with pa.ipc.new_stream(str(tmp_path / "saved/data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    found = read_annotations([tmp_path / "saved/data-00000-of-00001.arrow"])
    assert contents(tmp_path, found) == [jpeg(number) for number in range(4)]
    assert len(image_keys(found).unique()) == 4  # two rows each are called 0.jpg and 1.jpg, and are four images


def test_rows_of_one_path_have_their_own_bytes_and_one_without_is_a_path(tmp_path):
    images = [
        {"bytes": b"abc", "path": "a"},
        {"bytes": b"xyz", "path": "a"},
        {"bytes": None, "path": "a"},
        {"bytes": b"c", "path": None},
    ]
    table = pa.table({"image": images, "caption": ["one", "two", "three", "four"]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = read_annotations([tmp_path / "a.arrow"])
    sources = [image_source(tmp_path, found, row) for row in range(4)]
    assert sources[2] == tmp_path / "a"
    assert [sources[row].read_bytes() for row in (0, 1, 3)] == [b"abc", b"xyz", b"c"]
    assert sources[3].name.endswith(f"{tmp_path.name}/a.arrow/4")


def test_columns_of_a_table_are_named_and_rows_that_are_no_pairs_are_counted(tmp_path, capsys):
    table = pa.table({"jpg": [jpeg(0), None, jpeg(2), jpeg(3)], "text": ["a", "b", " ", "nan"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert main(["pack", str(tmp_path / "a.parquet"), *"--image jpg --caption text --output".split(), str(tmp_path / "a.arrow")]) == 0
    assert contents(tmp_path, read_annotations([tmp_path / "a.arrow"])) == [jpeg(0)]
    said = capsys.readouterr().out
    assert "1 without an image" in said and "2 whose caption is blank" in said


def test_what_cannot_be_packed_is_one_message(refused, tmp_path, data):
    pq.write_table(table_with_bytes(), tmp_path / "a.parquet")
    assert "no column 'caption' of captions; its columns are image, text" in refused("pack", tmp_path / "a.parquet", *out(tmp_path))
    assert "and --images" in refused("pack", data / "pairs.jsonl", *out(tmp_path))
    assert "pack them one at a time" in refused("pack", data / "pack.arrow", data / "pairs.jsonl", *out(tmp_path))
    assert "exists already" in refused("pack", data / "pairs.jsonl", "--images", data, "--output", data / "pack.arrow")
    with pa.ipc.new_file(
        str(tmp_path / "c.arrow"), table_with_bytes().schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as file:
        file.write_table(table_with_bytes())
    with pytest.raises(ValueError, match="with compression.*lavis-mafa pack"):
        read_annotations([tmp_path / "c.arrow"])
    assert main(["pack", str(tmp_path / "c.arrow"), "--caption", "text", *map(str, out(tmp_path))]) == 0
    assert contents(tmp_path, read_annotations([tmp_path / "new.arrow"])) == [jpeg(number) for number in range(4)]


def out(folder):
    return "--output", folder / "new.arrow"


# --- bad shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path):
    return write_shards(tmp_path, 10)[0]


@pytest.mark.parametrize("left", [0, 300, 512, 1500, 5120, 6000, 10_000])
def test_a_truncated_shard_is_refused_wherever_it_is_cut(refused, tmp_path, shard, left):
    whole = shard.read_bytes()
    assert left < len(whole.rstrip(b"\0"))
    shard.write_bytes(whole[:left])
    said = refused("index-shards", shard, *out(tmp_path))
    assert str(shard) in said and ("truncated" in said or "no tar" in said)
    assert not (tmp_path / "new.arrow").exists()


def test_a_shard_without_its_last_blocks_is_truncated(refused, tmp_path, shard):
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    shard.write_bytes(shard.read_bytes()[:end])
    assert f"the blocks that end a tar are missing after {last.name!r}" in refused("index-shards", shard, *out(tmp_path))


def test_a_broken_header_is_told_with_its_place(refused, tmp_path, shard):
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[2].offset
    content = bytearray(shard.read_bytes())
    content[place : place + 100] = b"x" * 100
    shard.write_bytes(content)
    assert f"broken at byte {place:,}" in refused("index-shards", shard, *out(tmp_path))


PAIR = {"a.jpg": b"jpg", "a.txt": b"a dog"}


@pytest.mark.parametrize(
    ("members", "kinds", "message"),
    [
        (PAIR, {"b.jpg": tarfile.SYMTYPE}, "'b.jpg' is a link"),
        (PAIR, {"b.jpg": tarfile.LNKTYPE}, "'b.jpg' is a link"),
        (PAIR, {"b.jpg": tarfile.CHRTYPE}, "'b.jpg' is a device or a pipe"),
        (PAIR, {"b.jpg": tarfile.FIFOTYPE}, "'b.jpg' is a device or a pipe"),
        ({**PAIR, "a.png": b"png"}, {}, "'a.jpg' and 'a.png' are two images of one key"),
        ({**PAIR, "a.JPG": b"jpg"}, {}, "'a.JPG' is there twice"),
        ({"a.jpg": b"jpg", "a.json": b"{}"}, {}, "holds no pair: of 1 keys none has an image and a caption in KEY.txt; --caption-key"),
        ({}, {}, "holds no pair: of 0 keys"),
    ],
)
def test_a_shard_that_is_no_list_of_pairs_is_one_message(refused, tmp_path, members, kinds, message):
    write_tar(tmp_path / "a.tar", members, **kinds)
    assert message in refused("index-shards", tmp_path / "a.tar", *out(tmp_path))


def test_what_is_compressed_missing_or_named_twice_is_told(refused, tmp_path, shard):
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    said = refused("index-shards", tmp_path / "b.tar.gz", *out(tmp_path))
    assert "is compressed" in said and f"unpack it once: gunzip < {tmp_path}" in said
    assert f"'{tmp_path}/*.tar' names the shards in it" in refused("index-shards", tmp_path, *out(tmp_path))
    assert "named twice" in refused("index-shards", tmp_path / "*.tar", shard, *out(tmp_path))
    assert "ends in .arrow" in refused("index-shards", shard, "--output", tmp_path / "pairs.json")
    (tmp_path / "there.arrow").write_text("mine")
    assert "never overwritten" in refused("index-shards", shard, "--output", tmp_path / "there.arrow")
    assert (tmp_path / "there.arrow").read_text() == "mine"


def test_keys_that_are_no_pairs_are_counted_and_names_lead_nowhere(tmp_path, capsys):
    members = {"../../up.jpg": jpeg(0), "../../up.txt": b" up \n", "/etc/root.jpg": jpeg(1), "/etc/root.txt": "gr\u00fcn".encode()}
    members |= {"._mac.jpg": b"", "c.jpg": b"", "d.txt": b"d", "e.jpg": b"", "e.txt": b"\xff\xfe", "f.jpg": b"", "f.txt": b" NaN"}
    write_tar(tmp_path / "a.tar", members)
    assert main(["index-shards", str(tmp_path / "a.tar"), "--output", str(tmp_path / "a.arrow")]) == 0
    said = capsys.readouterr().out
    for part in (
        "2 pairs of 1 shards",
        "1 without an image",
        "1 without a caption",
        "no UTF-8",
        "how a missing one is written",
    ):
        assert part in said
    table = read_annotations([tmp_path / "a.arrow"])
    assert contents(tmp_path, table) == [jpeg(0), jpeg(1)] and table["caption"].to_pylist() == [["up"], ["grün"]]


def test_an_index_that_no_longer_fits_its_shards_is_refused(data, tmp_path):
    table = read_annotations([data / "index.arrow"])
    check_shards(data / "tars", table)
    with pytest.raises(ValueError, match=r"no shard .*00000\.tar \(5 of 5 are missing\); images\.storage is the folder"):
        check_shards(tmp_path, table)
    write_shards(tmp_path)
    cut = tmp_path / "00002.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"00002\.tar holds 5,000 bytes, but its images need"):
        check_shards(tmp_path, table)
    with pytest.raises(OSError, match="ends within it"):
        image_source(tmp_path, table, 11).read_bytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"shard": "/etc/passwd", "offset": 0, "size": 9}, "shard is '/etc/passwd'"),
        ({"shard": "../a.tar", "offset": 0, "size": 9}, "shard is '../a.tar'"),
        ({"shard": "a.tar", "offset": -1, "size": 9}, "row 1: its image lies at"),
        ({"shard": "a.tar", "offset": 0, "size": None}, "row 1: its image lies at"),
    ],
)
def test_an_index_may_not_lead_out_of_the_folder_or_to_no_place(tmp_path, row, message):
    schema = pa.schema({"image": pa.string(), "caption": pa.string(), **PLACE})
    table = pa.Table.from_pylist([{"image": "a.jpg", "caption": "a dog", **row}], schema)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=message):
        read_annotations([tmp_path / "a.arrow"])


# --- streams ------------------------------------------------------------------------------------------------------------


def test_regrouped_shards_hold_the_groups_that_training_would_have_made(data, tmp_path):
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(COUNT, 8) + 0.1 * torch.randn(2, COUNT, 8), dim=2)
    for name, side in zip(("image.npy", "text.npy"), features, strict=True):
        np.save(tmp_path / name, side.numpy())
    arguments = ["--shards", data / "tars/*.tar", "--features", tmp_path / "image.npy", tmp_path / "text.npy"]
    arguments += ["--batch-size", 4, "--search-space", 8, "--seed", 3, "--output", tmp_path / "grouped"]
    assert main(["regroup", *map(str, arguments)]) == 0

    rows = GritSampler(COUNT, 4, 0, 1, "local", 3).order.long()
    queue = GritQueue(80, 8, seed=3)
    queue.collect(rows, *features[:, rows])
    wanted = next_epoch_order([queue.finish_epoch()], COUNT, 4, True, 3 * 100_003 + 1).tolist()
    assert pq.read_table(tmp_path / "grouped/order.parquet")["row"].to_pylist() == wanted
    stream = [*webdataset.WebDataset(str(tmp_path / "grouped/00000.tar"), shardshuffle=False)]
    assert [sample["txt"].decode() for sample in stream] == [caption(row) for row in wanted]
    assert [sample["jpg"] for sample in stream] == [jpeg(row) for row in wanted]
    assert json.loads(stream[0]["json"])["caption"].startswith(caption(wanted[0]))


def test_what_cannot_be_regrouped_is_one_message(refused, tmp_path, data):
    np.save(tmp_path / "a.npy", np.ones((COUNT - 1, 8), np.float32))
    arguments = ["--shards", data / "tars/*.tar", "--features", tmp_path / "a.npy", tmp_path / "a.npy"]
    said = refused("regroup", *arguments, "--batch-size", 4, "--output", tmp_path / "grouped")
    assert "has 19 rows" in said and "20 pairs" in said
    np.save(tmp_path / "a.npy", np.ones((COUNT, 8), np.float32))
    assert "--force goes on" in refused("regroup", *arguments, "--batch-size", 4, "--output", tmp_path / "grouped")
    said = refused("regroup", *arguments, "--force", "--batch-size", COUNT + 1, "--output", tmp_path / "grouped")
    assert f"--batch-size is {COUNT + 1}" in said
    assert not (tmp_path / "grouped").exists()
    assert "never overwritten" in refused("regroup", *arguments, "--batch-size", 4, "--output", data)


# --- everything else that opens images ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "root"), [("index.arrow", "tars"), ("pack.arrow", ".")])
def test_galleries_pages_and_mined_pairs_open_images_in_shards(data, tmp_path, name, root):
    files = [data / name]
    gallery = RetrievalPairs(np.asarray, str, data / root, files)
    assert [gallery[n]["image"].tolist() for n in (7, 3)] == [np.asarray(Image.open(io.BytesIO(jpeg(n)))).tolist() for n in (7, 3)]
    assert not unreadable(gallery, "val", workers=0)

    pairs = ImageTextPairs(np.asarray, str, data / root, files)
    with_name = image_path(pairs, 3)
    assert with_name == str(pairs.image_path(3)) and with_name.endswith("000000003.jpg")
    page = Thumbnails()
    page.add(pairs.image_path(3), "")
    assert page.entries[0]["src"].startswith("data:image/jpeg")

    source = SourceRows(pairs)
    row = {"image": 2, "text": 5, "caption": caption(5), "probability": 0.9, "own_probability": 0.8, "direction": "text for image"}
    table = pairs_table(source, pairs.image_keys.numpy(), pa.Table.from_pylist([row]), np.array([0]))
    pq.write_table(table, tmp_path / "pairs.parquet")
    mined = read_annotations([tmp_path / "pairs.parquet"])
    assert contents(data / root, mined) == [jpeg(number) for number in (*range(COUNT), 2)]
    assert mined["caption"][COUNT].as_py() == [caption(5)]


def test_an_image_that_is_no_longer_there_is_a_bad_sample_with_its_name(data, tmp_path):
    write_shards(tmp_path)
    pairs = ImageTextPairs(np.asarray, str, tmp_path, [data / "index.arrow"])
    (tmp_path / "00001.tar").write_bytes(b"")  # while training runs
    samples = IndexedDataset(pairs).__getitems__([0, 5])
    (bad,) = samples[1]["bad_samples"]
    assert bad["image"] == f"{tmp_path}/00001.tar/000000005.jpg" and "ends within it" in bad["reason"]


def test_files_and_shards_are_trained_on_together(data, tmp_path):
    files = [
        AnnotationFile(data / "pairs.jsonl", data / "images"),
        AnnotationFile(data / "index.arrow", data / "tars"),
        data / "pack.arrow",
    ]
    table = read_annotations(files, allow_absolute_paths=True)
    assert contents(tmp_path, table) == [jpeg(number) for number in (*range(COUNT),) * 3]
    assert image_keys(table).tolist() == [*range(3 * COUNT)]


def test_a_folder_with_an_index_beside_its_shards_needs_no_image_folder(data, tmp_path):
    write_shards(tmp_path)
    (tmp_path / "index.arrow").write_bytes((data / "index.arrow").read_bytes())
    info = {"annotations": {"train": {"storage": str(tmp_path / "index.arrow")}}}
    files, root, _ = own_files("", info, ["train"])
    assert root == tmp_path and contents(root, read_annotations(files["train"]))[4] == jpeg(4)
    info["annotations"]["val"] = {"storage": str(data / "index.arrow")}
    with pytest.raises(ValueError, match=r"images\.storage is not set"):  # which of the two?
        own_files("", info, ["train", "val"])


def test_shards_lie_where_they_lie_for_a_resumed_run(data, tmp_path):
    """A data set that was moved is the same data set."""
    first = read_annotations([AnnotationFile(data / "pack.arrow")])
    (tmp_path / "moved.arrow").write_bytes((data / "pack.arrow").read_bytes())
    one, other = (SimpleNamespace(table=table) for table in (first, read_annotations([tmp_path / "moved.arrow"])))
    assert fingerprints(one) == fingerprints(other)
