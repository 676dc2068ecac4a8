"""Features from files: what is read is what was written, of length 1; what is refused is one message that says where."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lavis_mafa.errors import UserError
from lavis_mafa.tools.features import check_own_pairs, read_features

ROWS, WIDTH = 11, 5
WRITTEN = np.random.default_rng(0).normal(size=(2, ROWS, WIDTH)).astype(np.float32)
LISTS = [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), WIDTH), pa.list_(pa.float16())]


def by_hand(row: int, side: int) -> list[float]:
    length = sum(float(x) ** 2 for x in WRITTEN[side, row]) ** 0.5
    return [float(x) / length for x in WRITTEN[side, row]]


def check(features, tolerance):
    index = torch.tensor([7, 0, 7, 10])
    for side, rows in enumerate(features.rows(index)):
        assert rows.dtype == torch.float32
        assert rows.tolist() == [pytest.approx(by_hand(row, side), abs=tolerance) for row in index.tolist()]


@pytest.mark.parametrize(("kind", "tolerance"), [("<f2", 2e-3), ("<f4", 1e-6), (">f4", 1e-6), ("<f8", 1e-6)])
def test_npy_files_stay_on_the_disk(tmp_path, kind, tolerance):
    paths = [tmp_path / "images.npy", tmp_path / "texts.npy"]
    for path, side in zip(paths, WRITTEN, strict=True):
        np.save(path, side.astype(kind))
    features = read_features(paths, ROWS)
    assert all(isinstance(side, np.memmap) for side in features)
    check(features, tolerance)


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    for name, side in zip(("image", "text"), WRITTEN, strict=True):
        (tmp_path / name).mkdir()
        for number, start in reversed(list(enumerate(range(0, ROWS, 4)))):
            np.save(tmp_path / name / f"{number}.npy", side[start : start + 4])
    check(read_features([tmp_path / "image", tmp_path / "text"], ROWS), 1e-6)
    np.save(tmp_path / "text" / "3.npy", WRITTEN[1].astype("f2"))
    with pytest.raises(UserError, match="differ in type or width"):
        read_features([tmp_path / "image", tmp_path / "text"], ROWS)


@pytest.mark.parametrize("kind", LISTS, ids=str)
@pytest.mark.parametrize("names", [("image_features", "text_features"), ("image", "text")])
def test_parquet_holds_both(tmp_path, kind, names):
    half = "half" in str(kind)
    columns = [pa.array([row.astype("f2" if half else "f4") for row in side], kind) for side in WRITTEN]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), tmp_path / "a.parquet", row_group_size=4)
    check(read_features([tmp_path / "a.parquet"], ROWS), 2e-3 if half else 1e-6)


def spoiled(**rows):
    array = WRITTEN[0].copy()
    for row, value in rows.items():
        array[int(row[1:]) - 1] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (WRITTEN[0][:9], r"has 9 rows of image features, but there are 11 pairs"),
        (np.ones((ROWS, 3), "f4"), r"images have 3 numbers each, but texts 5"),
        (spoiled(_8=[1, np.nan, 0, 0, 0], _9=0), r"row 8 is not finite"),
        (spoiled(_3=np.inf), r"row 3 is not finite"),
        (np.full((ROWS, WIDTH), 1e300), r"row 1 is not finite"),
        (spoiled(_11=0), r"row 11 is zero throughout"),
        (np.ones((ROWS, WIDTH), int), r"are int64 \[11, 5\]; allowed: float16"),
        (np.ones((ROWS, WIDTH), bool), r"are bool"),
        (np.ones(ROWS), r"are float64 \[11\]"),
        (np.array([[1.0, "a"]] * ROWS, object), r"Python objects.*allowed: a .npy file of numbers"),
    ],
)
def test_what_is_no_feature_of_every_pair_is_refused(tmp_path, array, message):
    np.save(tmp_path / "images.npy", array, allow_pickle=True)
    np.save(tmp_path / "texts.npy", WRITTEN[1])
    with pytest.raises(UserError, match=message) as refused:
        read_features([tmp_path / "images.npy", tmp_path / "texts.npy"], ROWS, "--guide-features")
    assert str(refused.value).startswith("--guide-features: ") and "\n" not in str(refused.value)


class Opened:
    """A pickle that would say so if anyone opened it."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(Opened())], ids=["empty", "short", "pickle"])
def test_a_file_of_something_else_is_refused_and_never_unpickled(tmp_path, content):
    np.save(tmp_path / "texts.npy", WRITTEN[1])
    (tmp_path / "images.npy").write_bytes(content)
    with pytest.raises(UserError, match="images.npy cannot be read"):
        read_features([tmp_path / "images.npy", tmp_path / "texts.npy"], ROWS)
    (tmp_path / "images.npy").write_bytes((tmp_path / "texts.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="images.npy cannot be read"):
        read_features([tmp_path / "images.npy", tmp_path / "texts.npy"], ROWS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0]] * 10 + [[1.0]], "row 11 has 1 numbers, but row 1 has 2"),
        ([[1.0, 2.0]] * 10 + [None], "a row is null, or holds one"),
        ([[1.0, 2.0]] * 10 + [[1.0, None]], "a row is null, or holds one"),
        (["a"] * 11, "column 'image' of .* holds string"),
        ([[1, 2]] * 11, r"are int64 \[11, 2\]"),
    ],
)
def test_lists_that_are_no_array_are_refused(tmp_path, rows, message):
    pq.write_table(pa.table({"image": rows, "text": rows}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read_features([tmp_path / "a.parquet"], ROWS)


def test_the_files_must_be_there_and_be_two_arrays_or_one_table(tmp_path):
    np.save(tmp_path / "a.npy", WRITTEN[0])
    np.savez(tmp_path / "a.npz", a=WRITTEN[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    for names, message in (
        (["a.npy"], "allowed: two .npy files or folders"),
        (["a.npz"], "allowed: two .npy files or folders"),
        (["a.npy", "b.npy"], "b.npy', but there is no such file"),
        (["empty", "empty"], "holds no .npy file"),
        (["a.parquet"], "a.parquet is not readable as Parquet"),
        (["x.parquet"], "has the columns x; needed: image_features and text_features"),
    ):
        with pytest.raises(UserError, match=message):
            read_features([tmp_path / name for name in names], ROWS)


def test_rows_in_another_order_are_noticed(tmp_path):
    random = np.random.default_rng(1)
    images = random.normal(size=(60, 8))
    for texts, pairs in ((images + 0.5 * random.normal(size=images.shape), True), (images[::-1], False)):
        for name, array in (("images", images), ("texts", texts)):
            np.save(tmp_path / f"{name}.npy", array)
        features = read_features([tmp_path / "images.npy", tmp_path / "texts.npy"], 60)
        if pairs:
            check_own_pairs(features)
        else:
            with pytest.raises(UserError, match="in the order of the annotations"):
                check_own_pairs(features)


def test_the_digest_is_that_of_every_number(tmp_path):
    def digest(array):
        np.save(tmp_path / "images.npy", array)
        np.save(tmp_path / "texts.npy", WRITTEN[1])
        return read_features([tmp_path / "images.npy", tmp_path / "texts.npy"], ROWS).digest()

    assert digest(WRITTEN[0]) == digest(WRITTEN[0].copy()) != digest(spoiled(_11=1))
