"""Files: what is written comes back to the bit; what is damaged, hostile or foreign is refused in words."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from statewise.core import (
    Cell,
    DataError,
    ResourceError,
    StatewiseError,
    UsageError,
    load_state,
    read_json,
    read_tensors,
    save_state,
    write_json,
    write_tensors,
)
from statewise.core import files as module
from statewise.core.files import parse_json

SAMPLE = {
    "weight": torch.arange(12.0).view(3, 4),
    "bias.0": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 3),
    "roots": torch.randn(3, dtype=torch.complex64),
    "wide": torch.randn(2, 2, dtype=torch.complex128),
    "half": torch.randn(5).half(),
    "bytes": torch.arange(256, dtype=torch.int32).to(torch.uint8),
    "turned": torch.arange(6.0).view(2, 3).T,
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
}


def craft(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file out of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(begin: int = 0, end: int = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# ---- the way there and back


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, SAMPLE, {"note": "ü"})
    found, metadata = read_tensors(path)
    assert list(found) == list(SAMPLE) and metadata["note"] == "ü"
    for name, t in SAMPLE.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t.resolve_conj()), name


def test_the_library_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = {k: t.contiguous() for k, t in SAMPLE.items() if k not in ("wide", "conjugate")}
    write_tensors(tmp_path / "ours", plain)
    theirs = load_file(tmp_path / "ours")
    save_file(plain, tmp_path / "theirs")
    ours, _ = read_tensors(tmp_path / "theirs")
    for name, t in plain.items():
        assert torch.equal(theirs[name], t) and torch.equal(ours[name], t)
    with pytest.raises(DataError, match="no hashes"):
        read_tensors(tmp_path / "theirs", require_hashes=True)


def test_mode_follows_the_umask_and_nothing_is_left_beside(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a", SAMPLE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """A mapped file would kill the process here."""
    path = tmp_path / "a"
    write_tensors(path, {"w": torch.ones(100_000)})
    found, _ = read_tensors(path)
    with open(path, "r+b") as file:
        file.write(b"\0" * 200_000)
        file.truncate(10)
    assert found["w"].sum() == 100_000


# ---- bad files: the rows of the table of bad input

BAD: dict[str, tuple[bytes, str]] = {
    "row 26: empty": (b"", "empty or truncated: 0 bytes"),
    "row 26: seven bytes": (b"\x10" * 7, "empty or truncated: 7 bytes"),
    "row 27: truncated header": (craft({"a": entry()}, length=500), "truncated: the header ends at byte 508"),
    "row 27: truncated body": (craft({"a": entry()}, b"\0\0"), "truncated: 2 bytes of tensors; the header says 4"),
    "row 27: trailing bytes": (
        craft({"a": entry()}, b"\0" * 9),
        "trailing bytes: 9 bytes of tensors; the header says 4",
    ),
    "row 28: length 2^63": (craft({}, length=1 << 63), "bad header: 9,223,372,036,854,775,808 bytes"),
    "row 28: above the limit": (craft({}, length=10_000_001), "the limit is 10,000,000"),
    "row 29: not UTF-8": (craft(b'{"\xff": 1}'), "bad header: .*not UTF-8"),
    "row 29: not JSON": (craft(b"{'a': 1}"), "bad header: .*not JSON"),
    "row 29: deep": (craft(b"[" * 5000), "bad header: .*nested deeper"),
    "row 29: a list": (craft(b"[]"), "bad header: .*expected an object"),
    "row 29: NaN": (craft(b'{"a": NaN}'), "bad header: .*NaN"),
    "row 29: long integer": (craft(b'{"a": ' + b"9" * 5000 + b"}"), "bad header"),
    "row 30: overflow": (craft({"a": entry(shape=[1 << 40, 1 << 40])}, b"\0" * 4), "tensor 'a': shape .* overflows"),
    "row 30: overflow behind a zero": (craft({"a": entry(0, 0, [1 << 40, 1 << 40, 0])}), "'a': shape .* overflows"),
    "row 30: negative": (craft({"a": entry(shape=[-1])}, b"\0" * 4), "tensor 'a': shape is not a list of sizes"),
    "row 30: true": (craft({"a": entry(shape=[True])}, b"\0" * 4), "tensor 'a': shape is not a list of sizes"),
    "row 30: rank": (craft({"a": entry(shape=[1] * 17)}, b"\0" * 4), "tensor 'a': rank 17; the limit is 16"),
    "row 30: size": (
        craft({"a": entry(shape=[2])}, b"\0" * 4),
        r"tensor 'a': F32 \[2\] takes 8 bytes; its offsets give 4",
    ),
    "row 31: overlap": (craft({"a": entry(), "b": entry()}, b"\0" * 4), "tensor 'b' overlaps"),
    "row 31: hole": (craft({"a": entry(4, 8)}, b"\0" * 8), "tensor 'a' leaves a hole"),
    "row 31: backwards": (craft({"a": entry(4, 0)}, b"\0" * 4), "data_offsets"),
    "row 31: three offsets": (craft({"a": {**entry(), "data_offsets": [0, 4, 4]}}, b"\0" * 4), "data_offsets"),
    "row 32: duplicate": (
        craft(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 4),
        "'a' appears twice",
    ),
    "row 32: duplicate by escape": (craft(b'{"a": 1, "\\u0061": 2}'), "'a' appears twice"),
    "row 34: path": (craft({"../../etc/x": entry()}, b"\0" * 4), "etc/x.*no control characters, no '..'"),
    "row 34: root": (craft({"/etc/x": entry()}, b"\0" * 4), "no leading slash"),
    "row 34: NUL": (craft({"a\0b": entry()}, b"\0" * 4), r"a\\x00b"),
    "row 34: newline": (craft({"a\nb": entry()}, b"\0" * 4), r"a\\nb"),
    "row 34: surrogate": (craft(b'{"\\ud800": 1}'), "ud800"),
    "row 34: long": (craft({"a" * 257: entry()}, b"\0" * 4), "1 to 256 characters, this one 257"),
    "row 35: NaN": (craft({"a": entry()}, struct.pack("<f", float("nan"))), "'a' holds 1 values that are not finite"),
    "row 35: inf": (craft({"a": entry()}, struct.pack("<f", float("inf"))), "'a' holds 1 values that are not finite"),
    "row 37: pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00", "a pickle.*pickle is never loaded"),
    "row 37: old pickle": (b"(dp0\nS'a'\np1\n", "a pickle.*pickle is never loaded"),
    "row 37: zip": (b"PK\x03\x04\x14\x00\x00\x00\x08\x00", "a zip archive.*pickle is never loaded"),
    "row 37: 7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive"),
    "row 37: gguf": (b"GGUF\x03\x00\x00\x00\x00", "a GGUF file, not a statewise checkpoint"),
    "dtype": (craft({"a": entry(dtype="F12")}, b"\0" * 4), "dtype 'F12'; takes F64"),
    "dtype is a list": (craft({"a": entry(dtype=["F32"])}, b"\0" * 4), "dtype .*; takes F64"),
    "entry": (craft({"a": 3}), "expected dtype, shape and data_offsets"),
    "extra entry": (craft({"a": {**entry(), "code": "os"}}, b"\0" * 4), "expected dtype, shape and data_offsets"),
    "metadata": (craft({"__metadata__": {"a": 1}}), "metadata must map names to text"),
    "bool": (craft({"a": entry(0, 1, dtype="BOOL")}, b"\2"), "bytes other than 0 and 1"),
    "hash of nothing": (craft({"__metadata__": {"sha256": '{"": "0", "a": "0"}'}}), "hash mismatch: the names"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    raw, words = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    began = time.process_time()
    with pytest.raises(DataError, match=words) as refused:
        read_tensors(path)
    line = str(refused.value)
    assert refused.value.code == 3 and str(path) in line
    assert "\n" not in line and len(line.replace(str(path), "")) < 300 and time.process_time() - began < 2
    line.encode()  # any terminal takes it
    assert path.read_bytes() == raw
    write_tensors(path, {"a": torch.ones(1)})  # and the next good request is served
    assert read_tensors(path)[0]["a"] == 1


def test_the_bad_files_were_found() -> None:
    assert len(BAD) >= 40
    assert {int(case.split()[1].rstrip(":")) for case in BAD if case.startswith("row")} >= {*range(26, 33), 34, 35, 37}


def test_nonfinite_is_taken_when_allowed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"w": torch.tensor([torch.nan, torch.inf])})
    with pytest.raises(DataError, match="allow_nonfinite"):
        read_tensors(tmp_path / "a")
    assert read_tensors(tmp_path / "a", allow_nonfinite=True)[0]["w"].isnan().tolist() == [True, False]


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    """Row 33: in numbers, names, shapes, metadata and hashes; safetensors alone takes most of them."""
    path, like = tmp_path / "a", {"w": torch.randn(3, 2), "n": torch.arange(3)}
    write_tensors(path, like, {"note": "x"})
    raw = path.read_bytes()
    for bit in range(0, 8 * len(raw), 3):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read_tensors(path, require_hashes=True, allow_nonfinite=True)
        except DataError as error:
            if bit // 8 >= len(raw) - 48:
                assert "hash mismatch in tensor" in str(error)
        else:
            raise AssertionError(f"bit {bit} of {8 * len(raw)} was not seen")


@pytest.mark.parametrize(
    ("name", "fault"), [("..", "no '..'"), ("a\n", "control"), ("", "1 to 256"), ("a" * 257, "257")]
)
def test_names_are_checked_before_writing(tmp_path: Path, name: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        write_tensors(tmp_path / "a", {name: torch.ones(1)})
    assert not os.listdir(tmp_path)


def test_what_is_not_a_file_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 41."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        sock.bind("socket")
        (tmp_path / "loop").symlink_to("loop")
        cases = {".": "a directory", "fifo": "a FIFO", "socket": "a socket", "/dev/zero": "a character device"}
        for name, kind in cases.items():
            for read in (read_tensors, read_json):
                with pytest.raises(DataError, match=f"is {kind}; expected a file"):
                    read(tmp_path / name)  # type: ignore[operator]
        with pytest.raises(DataError, match="loop"):
            read_tensors(tmp_path / "loop")


def test_missing_and_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 42, 43, 47."""
    for path in (tmp_path / "none", tmp_path / "no" / "where"):
        with pytest.raises(DataError, match=f"no such file: {path}; working directory {os.getcwd()}"):
            read_tensors(path)
    with pytest.raises(DataError, match=r"cannot write .*No such file.*working directory"):
        write_tensors(tmp_path / "no" / "where", SAMPLE)
    with pytest.raises(DataError, match="null"):
        read_tensors("a\0b")
    with pytest.raises(DataError, match="too long"):
        read_tensors(tmp_path / ("x" * 256))

    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    write_tensors(tmp_path / "a", SAMPLE)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        read_tensors(tmp_path / "a")
    with pytest.raises(DataError, match=r"cannot write .*Permission denied"):
        write_tensors(tmp_path / "a", SAMPLE)


@pytest.mark.parametrize("name", ["ü ñ", "🌊", " two  spaces ", "x" * 255, os.fsdecode(b"\xff\xfe")])
def test_any_path_works(tmp_path: Path, name: str) -> None:
    """Row 47."""
    write_tensors(tmp_path / name, {"a": torch.ones(1)})
    assert read_tensors(tmp_path / name)[0]["a"] == 1
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as refused:
        read_tensors(tmp_path / name)
    str(refused.value).encode()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_failing_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Rows 44 and 45."""
    path = tmp_path / "a"
    write_tensors(path, {"w": torch.ones(1000)})
    write = os.write

    def fail(fd: int, data: Any) -> int:
        if len(data) < 4000:
            return write(fd, data)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(ResourceError, match=r"4,000 bytes needed, [\d,]+ bytes free") as refused:
        write_tensors(path, {"w": torch.zeros(1000)})
    assert refused.value.code == 4
    assert read_tensors(path)[0]["w"].sum() == 1000 and os.listdir(tmp_path) == ["a"]


def test_nothing_runs_whatever_the_file_says(tmp_path: Path) -> None:
    """Pickles that leave a marker when loaded, in every reader."""
    import pickle

    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    archive = tmp_path / "zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil()))
    payloads = [pickle.dumps(Evil(), protocol) for protocol in range(6)] + [archive.read_bytes()]
    for raw in payloads:
        (tmp_path / "evil").write_bytes(raw)
        for read in (read_tensors, read_json, lambda path: load_state(path, Two())):
            with pytest.raises(StatewiseError):
                read(tmp_path / "evil")  # type: ignore[operator]
    assert not marker.exists()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_give_our_errors_or_the_same_numbers(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a"
    like = {"w": torch.arange(6.0).view(2, 3), "n": torch.arange(3)}
    write_tensors(path, like)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(raw)
    try:
        found, _ = read_tensors(path, require_hashes=True)
    except DataError:
        return
    assert all(torch.equal(found[name], t) for name, t in like.items())


# ---- JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n "b": {"c": 1,\n "c": 2}}', "x, line 3: 'c' appears twice"),
        ('{"a": ' * 33 + "1" + "}" * 33, "nested deeper than the limit of 32"),
        ("[" * 100_000, "nested deeper than the limit of 32"),
        ('{"a": "' + "b" * 1_000_000 + '"}', "longer than the limit of 1,000,000 bytes"),
        ('{"a": 1,\n}', "x, line 2: not JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('"a"', "a JSON str; expected an object"),
        ("", "line 1: not JSON"),
        ('{"a": "\\ud800', "not JSON"),
    ],
)
def test_bad_json(text: str, words: str) -> None:
    """Rows 20 and 21."""
    with pytest.raises(UsageError, match=words) as refused:
        parse_json(text, "x")
    assert refused.value.code == 2 and "\n" not in str(refused.value)


def test_good_json(tmp_path: Path) -> None:
    record = {"a": [{"b": 1}, {"b": 2}], "c": {"a": 'quo"te: {'}, "d": None, "e": 1e-300}
    write_json(tmp_path / "a.json", record)
    assert read_json(tmp_path / "a.json") == record
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == record


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 500_000, '"' + '\\"' * 500_000 + "\\", '{"a":1,' * 100_000, '"' * 999_999]
)
def test_hostile_json_takes_linear_time(text: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError):
        parse_json(text, "x", limit=2_000_000)
    assert time.process_time() - began < 2


# ---- states


class TwoState(NamedTuple):
    h: Tensor  # (B, 3)
    seen: Tensor  # (B,)


class Two(Cell[TwoState]):
    """h_t = h_{t-1} + W x_t, and how many were seen."""

    def __init__(self, hidden: int = 3):
        super().__init__()
        self.width, self.out_width, self.hidden = 2, hidden, hidden
        self.inp = nn.Linear(2, hidden)

    def initial_state(self, batch: int) -> TwoState:
        return TwoState(self.inp.weight.new_zeros(batch, self.hidden), torch.zeros(batch, dtype=torch.int64))

    def transition(self, u: Tensor, state: TwoState) -> tuple[Tensor, TwoState]:
        h = state.h + self.inp(u)
        return h, TwoState(h, state.seen + 1)


class Other(Two):
    """Another class with the same leaves."""


def test_a_saved_state_goes_on_to_the_bit(tmp_path: Path) -> None:
    layer, x = Two(), torch.randn(4, 9, 2)
    y, last = layer(x)
    _, middle = layer(x[:, :5])
    save_state(tmp_path / "s", layer, middle, weights=True, run="abc", steps=5)
    again = load_state(tmp_path / "s", layer)
    assert isinstance(again, TwoState)
    rest, end = layer(x[:, 5:], again)
    assert torch.equal(rest, y[:, 5:]) and torch.equal(end.h, last.h) and torch.equal(end.seen, last.seen)
    assert json.loads(read_tensors(tmp_path / "s")[1]["extra"]) == {"run": "abc", "steps": 5}


def test_a_state_keeps_its_infinities_and_may_be_empty(tmp_path: Path) -> None:
    layer = Two()
    save_state(tmp_path / "s", layer, TwoState(torch.full((2, 3), -torch.inf), torch.zeros(2, dtype=torch.int64)))
    assert load_state(tmp_path / "s", layer).h.isinf().all()
    save_state(tmp_path / "s", layer, layer.initial_state(0))
    assert load_state(tmp_path / "s", layer).h.shape == (0, 3)


def test_the_state_of_another_layer_names_both(tmp_path: Path) -> None:
    """Row 4."""
    save_state(tmp_path / "s", Two(), Two().initial_state(1), weights=True)
    cases: list[tuple[Callable[[], Any], str]] = [
        (Other, r"the state of Two \(h float32 \[3\], seen int64 \[\]\); this layer is Other"),
        (lambda: Two(4), r"the state of Two .*\[3\].*; this layer is Two \(h float32 \[4\]"),
        (lambda: Two().double(), r"float32 .*; this layer is Two \(h float64"),
        (Two, "the state of a Two with other weights"),
    ]
    for make, words in cases:
        with pytest.raises(DataError, match=words) as refused:
            load_state(tmp_path / "s", make())
        assert refused.value.code == 3


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    layer = Two()
    write_tensors(tmp_path / "weights", layer.state_dict())
    with pytest.raises(DataError, match="not a saved state"):
        load_state(tmp_path / "weights", layer)
    save_state(tmp_path / "s", layer, layer.initial_state(1))
    tensors, metadata = read_tensors(tmp_path / "s")
    for version, words in (("2", "format 2, this statewise reads up to 1; upgrade"), ("x", "format 'x'; expected")):
        write_tensors(tmp_path / "new", tensors, {**metadata, "format": version})
        with pytest.raises(DataError, match=words):
            load_state(tmp_path / "new", layer)


def test_uneven_leaves_are_refused(tmp_path: Path) -> None:
    layer = Two()
    save_state(tmp_path / "s", layer, TwoState(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(DataError, match=r"batches \[1, 2\]"):
        load_state(tmp_path / "s", layer)


def test_core_needs_no_safetensors() -> None:
    code = "import statewise.core, sys; assert not {'safetensors', 'numba', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_hashes_are_what_catches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "a", {"w": torch.ones(3)})
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a").write_bytes(raw)
    monkeypatch.setattr(module, "_verify", lambda *_: None)
    read_tensors(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(DataError, match="hash mismatch in tensor 'w'"):
        read_tensors(tmp_path / "a")


def test_one_number_cut_out_of_many_is_written(tmp_path):
    """torch calls it contiguous whatever its stride is."""
    cut = torch.arange(6).view(1, 6)[:, ::2][:, 1:2].expand(1, 1)[:, -1]
    write_tensors(tmp_path / "t", {"cut": cut, "other": torch.arange(8)[5:6:2]})
    found, _ = read_tensors(tmp_path / "t")
    assert found["cut"].tolist() == [2] and found["other"].tolist() == [5]
