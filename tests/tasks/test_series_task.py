"""The user's own series: every layout gives the same task, and every fault one line that says where."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statewise.core import DataError, StatewiseError, UsageError, put
from statewise.tasks import SPLITS, Series, tasks

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 9, 24)
ROWS = [RNG.normal(size=(n, 2)).round(3) for n in LENGTHS]
CLASSES = ["calm" if i % 3 else "storm" for i in range(24)]
TARGETS = RNG.normal(size=24).round(3)


def csv(header: str, rows: Any) -> str:
    return header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def labelled_csv(path: Path) -> Path:
    rows = [(f"s{i}", t, *row, CLASSES[i]) for i, series in enumerate(ROWS) for t, row in enumerate(series.tolist())]
    path.write_text(csv("series,time,a,b,label", rows))
    return path


def every_row(task: Series) -> dict[Any, int]:
    """Inputs of each sequence -> its answer, over all splits, in raw units."""
    found = {}
    for split in SPLITS:
        part = task.rows(split)
        for i in range(len(part)):
            start = int(part.starts[i])
            values = part.values[start : start + int(part.lengths[i])]
            found[values.numpy().round(3).tobytes()] = int(part.y[i])
    return found


WANTED = {series.astype(np.float32).round(3).tobytes(): int(label == "storm") for series, label in zip(ROWS, CLASSES)}


def test_labels_in_a_csv(tmp_path: Path) -> None:
    task = Series(path=str(labelled_csv(tmp_path / "own.csv")))
    assert (task.kind, task.metric, task.higher_is_better) == ("classification", "accuracy", True)
    assert (task.x_width, task.y_width, task.classes) == (2, 2, ("calm", "storm"))
    assert [len(task.rows(split)) for split in SPLITS] == [16, 4, 4]
    assert every_row(task) == WANTED
    steps = torch.cat([b.x[row, : int(b.lengths[row])] for b in task.batches("train") for row in range(len(b.x))])  # type: ignore[index]
    assert steps.mean(0).abs().max() < 1e-5
    assert (steps.std(0, correction=0) - 1).abs().max() < 1e-5
    batch = task.batch(3, 5, seed=0)
    assert batch.weight.sum() == 5
    assert 0 < task.chance() <= 1
    assert 0 <= task.baseline() <= 1
    assert torch.equal(batch.x, Series(path=task.path).batch(3, 5, seed=0).x)


def test_order_of_rows_and_columns_is_free(tmp_path: Path) -> None:
    path = labelled_csv(tmp_path / "own.csv")
    header, *lines = path.read_text().splitlines()
    order = RNG.permutation(len(lines))
    swapped = [[line.split(",")[i] for i in (4, 2, 1, 3, 0)] for line in np.array(lines)[order]]
    (tmp_path / "mixed.csv").write_text(csv("label,a,time,b,series", swapped))
    assert every_row(Series(path=str(tmp_path / "mixed.csv"))) == WANTED
    assert header == "series,time,a,b,label"


def npz_of_labels(folder: Path) -> Path:
    path = folder / "own.npz"
    np.savez(path, X=np.concatenate(ROWS), lengths=LENGTHS, y=np.array(CLASSES))
    return path


def parquet_of_labels(folder: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    whole = np.concatenate(ROWS)
    owner = np.repeat(np.arange(24), LENGTHS)
    time = np.concatenate([np.arange(n) for n in LENGTHS])
    columns = {"series": owner, "time": time, "a": whole[:, 0], "b": whole[:, 1], "label": np.array(CLASSES)[owner]}
    path = folder / "own.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def folder_per_class(folder: Path) -> Path:
    for i, (series, label) in enumerate(zip(ROWS, CLASSES)):
        (folder / "own" / label).mkdir(parents=True, exist_ok=True)
        if i % 2:
            np.save(folder / "own" / label / f"{i}.npy", series)
        else:
            (folder / "own" / label / f"{i}.csv").write_text(csv("a,b", series.tolist()))
    return folder / "own"


def folder_with_list(folder: Path) -> Path:
    (folder / "own").mkdir()
    for i, series in enumerate(ROWS):
        (folder / "own" / f"{i}.csv").write_text(csv("a,b", series.tolist()))
    (folder / "own" / "labels.csv").write_text(
        csv("file,label", [(f"{i}.csv", label) for i, label in enumerate(CLASSES)])
    )
    return folder / "own"


def folder_of_series(folder: Path) -> Path:
    (folder / "own").mkdir()
    for i, (series, label) in enumerate(zip(ROWS, CLASSES)):
        (folder / "own" / f"{i:02}.csv").write_text(csv("a,b,label", [(*row, label) for row in series.tolist()]))
    return folder / "own"


def windows_csv(folder: Path) -> Path:
    path = labelled_csv(folder / "own.csv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    return path


LAYOUTS = [npz_of_labels, parquet_of_labels, folder_per_class, folder_with_list, folder_of_series, windows_csv]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_task(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    task = Series(path=str(layout(tmp_path)))
    assert task.classes == ("calm", "storm")
    assert every_row(task) == WANTED


def test_integer_classes_keep_their_order(tmp_path: Path) -> None:
    y = np.arange(24) % 12
    np.savez(tmp_path / "own.npz", X=np.stack([np.full((4, 1), i) for i in range(24)]), y=y)
    task = Series(path=str(tmp_path / "own.npz"))
    assert task.classes == tuple(map(str, range(12)))
    for split in SPLITS:
        part = task.rows(split)
        assert (part.values[part.starts, 0].long() % 12 == part.y).all()


def test_one_target_for_each_series(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", X=np.concatenate(ROWS), lengths=LENGTHS, y=TARGETS)
    task = Series(path=str(tmp_path / "own.npz"))
    assert (task.kind, task.metric, task.higher_is_better, task.y_width) == ("regression", "loss", False, 1)
    train = task.rows("train").y
    assert train.mean().abs() < 1e-6
    assert float(train.std(correction=0)) == pytest.approx(1)
    back = {series.astype(np.float32).tobytes(): target for series, target in zip(ROWS, TARGETS)}
    raw, scaled = [], []
    for split in SPLITS:
        part = task.rows(split)
        for i, start in enumerate(part.starts.tolist()):
            raw.append(back[part.values[start : start + int(part.lengths[i])].numpy().tobytes()])
            scaled.append(float(part.y[i, 0]))
    assert np.corrcoef(raw, scaled)[0, 1] == pytest.approx(1)
    batch = next(task.batches("test"))
    assert batch.weight.sum(1).tolist() == [1] * len(batch.x)
    assert task.baseline() < task.chance()


def steps_csv(path: Path, steps: int = 400, holes: bool = True) -> tuple[Path, np.ndarray, np.ndarray]:
    x = RNG.normal(size=(steps, 2)).round(4)
    y = (x[:, 0] * 2 + 5).round(4)
    rows = [
        ["" if holes and t == 50 else a, b, "NaN" if holes and t in (60, 390) else target]
        for t, ((a, b), target) in enumerate(zip(x, y))
    ]
    path.write_text(csv("a,b,target_load", rows))
    return path, x, y


def test_a_target_at_every_step(tmp_path: Path) -> None:
    path, x, y = steps_csv(tmp_path / "own.csv")
    task = Series(path=str(path), length=40)
    assert (task.kind, task.x_width, task.y_width) == ("regression", 2, 1)
    asked = {split: np.flatnonzero(task.rows(split).asked) for split in SPLITS}  # type: ignore[arg-type]
    assert set(asked["train"]) == set(range(280)) - {60}
    assert set(asked["validation"]) == set(range(280, 340))
    assert set(asked["test"]) == set(range(340, 400)) - {390}
    assert sum(float(b.weight.sum()) for b in task.batches("test")) == 59  # each once
    part = task.rows("train")
    assert part.values[50].tolist() == pytest.approx([x[49, 0], x[50, 1]])  # carried forward
    assert np.corrcoef(part.y[asked["test"], 0], y[asked["test"]])[0, 1] == pytest.approx(1)
    batch = next(task.batches("validation"))
    exact = (batch.x[..., :1] - batch.y)[batch.weight > 0]
    assert exact.abs().max() < 0.05  # the target is a line in the first channel
    assert task.metrics(batch.y, batch)["skill"][0] == pytest.approx(task.metrics(batch.y, batch)["skill"][1])


def test_forecasting_where_nothing_is_asked(tmp_path: Path) -> None:
    values = np.sin(np.arange(600) / 5).round(4)
    (tmp_path / "own.csv").write_text(
        csv("time,load", [(f"2024-01-01T{i // 60:02}:{i % 60:02}:00", v) for i, v in enumerate(values)])
    )
    task = Series(path=str(tmp_path / "own.csv"), horizon=3, length=64)
    assert (task.kind, task.x_width, task.y_width) == ("regression", 2, 3)
    assert float(task.rows("train").y[task.rows("train").asked].square().mean()) == pytest.approx(1, abs=1e-3)
    assert task.baseline() == pytest.approx(1, abs=0.15)
    two = Series(path=str(tmp_path / "own.csv"), horizon=3, length=64, ignore="time")
    assert torch.equal(two.batch(0, 4, seed=0).y, task.batch(0, 4, seed=0).y)


def test_an_npy_is_one_series(tmp_path: Path) -> None:
    values = RNG.normal(size=(300, 2))
    np.save(tmp_path / "own.npy", values)
    np.save(tmp_path / "one.npy", values[:, 0])
    both, one = (Series(path=str(tmp_path / name), length=32) for name in ("own.npy", "one.npy"))
    assert (both.x_width, both.y_width, one.x_width, one.y_width) == (4, 2, 2, 1)
    assert torch.equal(both.rows("train").y[:, :1], one.rows("train").y)


def test_names_of_columns_can_be_chosen(tmp_path: Path) -> None:
    path = labelled_csv(tmp_path / "own.csv")
    path.write_text(path.read_text().replace("series,time,a,b,label", "who,t,a,b,state", 1))
    task = Series(path=str(path), series_column="who", time_column="t", label_column="state")
    assert every_row(task) == WANTED
    with pytest.raises(DataError, match=r"no column 'stat'; near: state"):
        put(task, "label_column", "stat").load()
    with pytest.raises(DataError, match=r"no column 'x' to ignore"):
        put(task, "ignore", "x").load()


def test_ignored_columns(tmp_path: Path) -> None:
    path, _, _ = steps_csv(tmp_path / "own.csv")
    assert Series(path=str(path), ignore="b").x_width == 1


CALM = "series,a,label\n" + "".join(f"{i},{i}.5,{'ab'[i % 2]}\n" for i in range(12))
BAD_CSV: dict[str, tuple[str | bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "no rows": ("a,b\n", "a header and no rows"),
    "ragged": (CALM + "12,1.5\n", r":14: 2 cells; the header has 3"),
    "long row": (CALM + "12,1.5,a,9\n", r":14: 4 cells"),
    "text in numbers": (CALM + "12,high,a\n", r":14: column 'a' holds 'high'; expected a number"),
    "infinite": (CALM + "12,inf,a\n", r":14: column 'a' is infinite"),
    "no label": (CALM + "12,1,\n", r":14: column 'label' is empty"),
    "two labels": (CALM + "0,1,b\n", r":14: label 'b', but the series began with 'a'"),
    "no name": (CALM + ",1,a\n", r":14: column 'series' is empty"),
    "one class": (CALM.replace(",b\n", ",a\n"), "every label is 'a'; expected at least two classes"),
    "one of a class": (CALM + "12,1,c\n", "1 of class 'c'; expected at least 10, and 2 of each class"),
    "few": ("series,a,label\n0,1,a\n1,1,b\n2,1,a\n3,1,b\n", "4 series"),
    "nul": (CALM.encode() + b"12,\0,a\n", r":14: a NUL byte"),
    "binary": (bytes(range(1, 256)) * 10, "not UTF-8|NUL|columns|cells|CSV"),
    "utf-16": (CALM.encode("utf-16"), r":1: the file is UTF-16; save it as UTF-8"),
    "latin-1": (CALM.encode() + b"12,1,caf\xe9\n", r":14: byte 9 is not UTF-8"),
    "semicolons": (CALM.replace(",", ";"), r":1: the columns seem to be separated by ';'; expected commas"),
    "twice": (CALM.replace("series,a,label", "a,a,label"), r":1: column 'a' stands there twice"),
    "nameless": (CALM.replace("series,a,label", "series,,label"), r":1: a column has no name"),
    "open quote": (CALM + '12,"1,a\n', "14: not a CSV row"),
    "long line": (CALM + "1" * (2 << 20), r":14: a line of more than 1048576 bytes"),
    "no inputs": ("series,label\n1,a\n", "no column is left for the input"),
    "label and target": (CALM.replace("series,a,label", "target,a,label"), "has both 'label' and 'target'"),
    "same time": ("time,a\n1,2\n2,3\n1,4\n", r":4: a second row of this series at the same 'time'"),
    "no time": ("time,a\n1,2\nsoon,3\n", r":3: column 'time' holds 'soon'; expected a number"),
    "no date": ("time,a\n2024-01-01,2\n2024-13-01,3\n", r":3: column 'time' holds '2024-13-01'; expected a number or"),
    "no numbers": ("a,target\n" + "nan,1\n" * 50, r"column 'a' \(task.ignore=a leaves it out\) holds no number"),
    "constant target": ("a,target\n" + "".join(f"{i},7\n" for i in range(50)), "target 1 of 1 is constant"),
    "constant series": ("a\n" + "7\n" * 50, r"column 'a' \(task.ignore=a leaves it out\) is constant over the"),
    "huge": (CALM + "12,-2e37,a\n", r":14: column 'a' is -2e\+37; expected at most 1e\+37"),
    "no header": ("1.5,2\n" * 50, r":1: holds numbers, 1.5, 2, and no names; the first line must name every column"),
    "no target left": ("a,target\n" + "".join(f"{i},\n" for i in range(50)), "nothing is left to ask"),
    "short": ("a\n1\n2\n3\n", "give more data"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CSV)
def test_bad_csv(name: str, tmp_path: Path) -> None:
    content, said = BAD_CSV[name]
    path = tmp_path / "own.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(Series(path=str(path)), said, path)


def test_columns_that_pandas_numbers_are_names(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("0,1\n" + "".join(f"{i % 7},{i % 5}\n" for i in range(60)))
    assert Series(path=str(path)).x_width == 4


def test_files_of_a_folder_have_the_same_columns_in_any_order(tmp_path: Path) -> None:
    for kind in "no":
        (tmp_path / kind).mkdir()
        for i in range(6):
            names = "ab" if i % 2 else "ba"
            row = {"a": str(i), "b": str(100 + i)}
            (tmp_path / kind / f"{i}.csv").write_text(",".join(names) + "\n" + ",".join(row[n] for n in names) + "\n")
    task = Series(path=str(tmp_path))
    assert task.rows("train").values.argmax(1).eq(task.rows("train").values.argmax(1)[0]).all()
    (tmp_path / "n" / "6.csv").write_text("a,c\n1,2\n")
    refused(Series(path=str(tmp_path), length=99), "columns a, c; the series before it have b, a", tmp_path)


def test_a_row_below_a_quoted_line_break_has_its_own_number(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text('a,note\n1,"two\nlines"\n2,x\nhigh,y\n')
    refused(Series(path=str(path), ignore="note"), r":5: column 'a' holds 'high'", path)


def refused(task: Series, said: str, path: Path) -> None:
    with pytest.raises(DataError, match=said) as error:
        task.load()
    assert error.value.code == 3
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200 + len(str(path))
    assert str(path) in str(error.value)


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return out.getvalue()


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def npy_header(shape: str, dtype: str = "<f8", data: bytes = b"") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + data


X = np.arange(24.0).reshape(12, 2)
BAD_NPZ: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "no zip": (b"PK\x03\x04 not really", "not a readable NPZ file"),
    "pickle": (b"\x80\x04K\x01.", "not a readable NPZ file"),
    "cut": (zipped(X=npy(X))[:100], "not a readable NPZ file"),
    "objects": (zipped(X=npy(np.array([{}, None]))), "X.npy: an array of Python objects, which is a pickle"),
    "no X": (zipped(Z=npy(X)), "no array X; it holds Z"),
    "more": (zipped(X=npy(X), Z=npy(X)), "unknown array 'Z'"),
    "texts": (zipped(X=npy(np.array(["a"]))), "X has dtype"),
    "complex": (zipped(X=npy(X + 1j)), "dtype complex128"),
    "rank 4": (zipped(X=npy(X[None, None])), "X has shape"),
    "no steps": (zipped(X=npy(np.zeros((5, 0, 2)))), "it holds no steps"),
    "lengths": (zipped(X=npy(X), lengths=npy(np.array([5, 6]))), "lengths sum to 11; X has shape"),
    "float lengths": (zipped(X=npy(X), lengths=npy(np.array([6.0, 6.0]))), "expected positive integers"),
    "negative lengths": (zipped(X=npy(X), lengths=npy(np.array([-1, 13]))), "expected positive integers"),
    "y too short": (zipped(X=npy(X), y=npy(np.array([1, 2]))), r"y has shape \(2,\); X holds 12 series"),
    "y of texts in 2-D": (zipped(X=npy(X), y=npy(np.array([["a"]] * 12))), "expected classes"),
    "infinite": (zipped(X=npy(np.full((12, 2), np.inf))), r"X\[0, 0, 0\] is infinite \(24 in all\)"),
    "declared too large": (zipped(X=npy_header("(1000000000000,)")), "declares shape"),
    "overflowing": (zipped(X=npy_header("(4294967296, 4294967296, 1)")), "declares shape"),
    "negative": (zipped(X=npy_header("(-5, 2)", data=bytes(80))), "declares shape"),
    "no header": (zipped(X=b"\x93NUMPY"), "not an NPY array"),
    "code in the header": (zipped(X=npy_header("__import__('os')")), "not an NPY array"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NPZ)
def test_bad_npz(name: str, tmp_path: Path) -> None:
    content, said = BAD_NPZ[name]
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    refused(Series(path=str(path)), said, path)


def test_zip_bomb_is_refused_by_its_declared_size(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    content = bytearray(zipped(X=npy(X)))
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(content)
    refused(Series(path=str(path)), "declares 4000000000 bytes; the limit is 2147483648", path)


def test_bad_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "own.parquet"
    cases: list[tuple[Any, str]] = [
        (b"PAR1 not really", "not a Parquet file"),
        ({"a": [1.0, float("inf"), 2.0]}, r"row 2: column 'a' is infinite"),
        ({"a": ["x", "y"]}, "column 'a' holds"),
        ({"a": [[1], [2]]}, "column 'a' is list"),
        ({"a": []}, "no rows"),
    ]
    for content, said in cases:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(pa.table(content), path)
        refused(Series(path=str(path)), said, path)


def test_bad_folders(tmp_path: Path) -> None:
    refused(Series(path=str(tmp_path)), "holds no .csv or .npy files, and no folders", tmp_path)
    (tmp_path / "a").mkdir()
    refused(Series(path=str(tmp_path)), "its folders hold no .csv or .npy files", tmp_path)
    own = folder_with_list(tmp_path)
    listed = (own / "labels.csv").read_text()
    for name, said in (
        ("../outside.csv", "labels.csv:26: '../outside.csv' is not a file inside"),
        ("/etc/passwd", "labels.csv:26: '/etc/passwd' is not a file inside"),
        ("99.csv", "labels.csv:26: no such file"),
    ):
        (own / "labels.csv").write_text(listed + f"{name},calm\n")
        refused(Series(path=str(own)), said, own)
    (own / "labels.csv").write_text(listed.replace("file,", "name,"))
    refused(Series(path=str(own)), "no column 'file'", own)
    (own / "labels.csv").write_text(listed)
    (own / "3.csv").write_text("a\n1\n")
    refused(Series(path=str(own)), "3.csv: 1 channels; the series before it have 2", own)


def test_bad_paths(tmp_path: Path) -> None:
    refused(Series(path=str(tmp_path / "none.csv")), "no such file", tmp_path)
    (tmp_path / "own.xlsx").write_bytes(b"PK")
    refused(Series(path=str(tmp_path / "own.xlsx")), "unknown kind of file '.xlsx'", tmp_path)
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    refused(Series(path=str(loop)), "symbolic links|no such file", tmp_path)
    with pytest.raises(UsageError, match="path is not set"):
        Series().load()
    with pytest.raises(UsageError, match="horizon is 0"):
        Series(horizon=0)


def test_after_a_refusal_a_good_file_is_served(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("a\n1\n2\n3\n")
    task = Series(path=str(path))
    with pytest.raises(DataError):
        task.load()
    labelled_csv(path)
    assert task.classes == ("calm", "storm")


def test_the_class_says_what_it_can_be_before_it_sees_data() -> None:
    info = tasks["series"]
    assert info.cls.kind == "classification or regression"  # type: ignore[comparison-overlap]
    assert info.cls.metric == "accuracy or loss"


@pytest.mark.parametrize("seed", range(3))
def test_no_bytes_give_another_kind_of_error(seed: int, tmp_path: Path) -> None:
    """Whole files with a few bytes changed are either read or refused in one line."""
    rng = np.random.default_rng(seed)
    good = [labelled_csv(tmp_path / "own.csv").read_bytes(), npz_of_labels(tmp_path).read_bytes()]
    outcomes = []
    for i in range(120):
        content = bytearray(good[i % 2])
        for _ in range(rng.integers(0, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        path = tmp_path / f"{i}.{('csv', 'npz')[i % 2]}"
        path.write_bytes(content[: rng.integers(1, len(content))] if rng.random() < 0.2 else content)
        try:
            Series(path=str(path)).load()
            outcomes.append("read")
        except StatewiseError as error:
            assert "\n" not in str(error)
            outcomes.append("refused")
    assert outcomes.count("read") > 10
    assert outcomes.count("refused") > 10
