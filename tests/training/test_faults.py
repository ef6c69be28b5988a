"""Kills, full disks and damaged files: a checkpoint that was acknowledged is there, and what is read is whole."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import in_child, litter, toy

from statewise.core import DataError, ResourceError, UsageError
from statewise.training import checkpoint as module
from statewise.training import fit, load, read_log
from statewise.training.checkpoint import Checkpoint, clean, newest, save
from statewise.training.log import Log, decode, encode


def content(step: int, size: int = 20_000) -> Checkpoint:
    return Checkpoint({"w": torch.full((size,), float(step))}, {"m": torch.full((size,), -float(step))}, {"step": step})


def assert_whole(found: Checkpoint | None) -> int:
    """The step of a checkpoint whose parts belong together."""
    assert found is not None
    step = found.state["step"]
    assert (found.model["w"] == step).all() and (found.optim["m"] == -step).all()
    return int(step)


# ---- F1


def kill_saves(run: Path, rounds: int, seed: int, keep: Callable[..., Path] = save) -> tuple[int, int]:
    """Kill a process that saves all the time, up to 30 ms after it began; returns kills in a save and losses."""
    rng, torn, lost, step = random.Random(seed), 0, 0, 1
    (run / "experiment.json").touch()
    save(run, step, content(step))
    for _ in range(rounds):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writer, step.to_bytes(8, "little"))  # it has begun
                for next_step in range(step + 1, step + 10**6):
                    keep(run, next_step, content(next_step))
                    os.write(writer, next_step.to_bytes(8, "little"))  # acknowledged
            finally:
                os._exit(98)
        os.close(writer)
        with open(reader, "rb") as pipe:
            begun = pipe.read(8)
            time.sleep(rng.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            acknowledged = begun + pipe.read()
        promised = int.from_bytes(acknowledged[-8:], "little")
        torn += bool(litter(run))
        found, _ = newest(run)
        lost += found is None or found.state["step"] < promised
        if found is None:
            save(run, step, content(step))
            continue
        step = assert_whole(found)
        clean(run)
        assert not [name for name in litter(run) if not name.endswith(".old")]
    return torn, lost


def test_forty_kills_lose_nothing(tmp_path: Path) -> None:
    torn, lost = kill_saves(tmp_path, 40, seed=1)
    assert lost == 0
    assert torn > 2  # or the kills hit nothing worth hitting


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_kills_lose_nothing(tmp_path: Path) -> None:
    torn, lost = kill_saves(tmp_path, 1000, seed=2)
    assert lost == 0 and torn > 100


def test_a_save_in_place_is_caught(tmp_path: Path) -> None:
    """The harness finds fault with a save that writes where the reader looks, over what was there."""

    def careless(run: Path, step: int, what: Checkpoint) -> Path:
        shutil.rmtree(run / "checkpoints")
        return save(run, step, what)

    assert kill_saves(tmp_path, 30, seed=3, keep=careless)[1] > 0


# ---- F2

OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "replace")


class PowerCut:
    """Counts file operations and ends the process before number `limit`; files that were not synced are lost."""

    def __init__(self, limit: int):
        self.limit, self.count = limit, 0
        self.real = {name: getattr(os, name) for name in OPERATIONS}
        self.unsynced: dict[int, str] = {}

    def install(self, *, sync: bool = True) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._counted(name, sync))

    def _counted(self, name: str, sync: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count > self.limit:
                for fd in self.unsynced:
                    os.ftruncate(fd, 0)  # through the descriptor: wherever the file has been renamed to
                os._exit(77)
            if name == "close" and args[0] in self.unsynced:
                return None  # kept open, to be lost
            if name == "fsync" and not sync:
                return None
            found = self.real[name](*args, **kwargs)
            if name == "open" and args[1] & os.O_WRONLY:
                self.unsynced[found] = str(args[0])
            if name == "fsync":
                self.unsynced.pop(args[0], None)
            return found

        return call


def cut_everywhere(run: Path, step: int, *, sync: bool = True) -> tuple[int, int]:
    """End a save before each of its operations in turn; returns how many there are and how often all was lost."""
    lost = 0
    for limit in range(500):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run / "experiment.json").touch()
        save(run, 1, content(1, 100))
        save(run, 2, content(2, 100))

        def work(limit: int = limit) -> int:
            cut = PowerCut(limit)
            cut.install(sync=sync)
            save(run, step, Checkpoint(content(3, 100).model, content(3, 100).optim, {"step": 3}))
            return 0

        code = in_child(work)
        found, _ = newest(run)
        if found is None or found.state["step"] < 2 or (code == 0 and found.state["step"] != 3):
            lost += 1
        else:
            assert_whole(found)
            clean(run)
            assert not [name for name in litter(run) if not name.endswith(".old")]
            save(run, 9, content(9, 100))
            assert assert_whole(newest(run)[0]) == 9
        if code == 0:
            return limit, lost
        assert code == 77
    raise AssertionError("the save never ended")


@pytest.mark.parametrize("step", [3, 2])
def test_power_cut_before_every_operation(tmp_path: Path, step: int) -> None:
    """A new step, and the same step anew: the old checkpoint or the new one, never neither."""
    count, lost = cut_everywhere(tmp_path / "run", step)
    assert count > 20 and lost == 0


def test_a_save_without_sync_is_caught(tmp_path: Path) -> None:
    assert cut_everywhere(tmp_path / "run", 2, sync=False)[1] > 0


# ---- F5


def test_a_disk_that_fills_up_at_any_byte(tmp_path: Path) -> None:
    save(tmp_path, 1, content(1, 2000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "checkpoints" / "step-1" / "model.safetensors").stat().st_size
    for k in [0, 1, 7, 8, 9, size - 1, *range(100, size - 1, size // 44)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (k, hard))
        try:
            with pytest.raises(
                ResourceError, match=r"File too large; 16,000 bytes needed, [\d,]+ bytes free"
            ) as refused:
                save(tmp_path, 2, content(2, 2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert refused.value.code == 4
        assert os.listdir(tmp_path / "checkpoints") == ["step-1"] and not litter(tmp_path)
    assert assert_whole(newest(tmp_path)[0]) == 1
    save(tmp_path, 2, content(2, 2000))
    assert assert_whole(newest(tmp_path)[0]) == 2


def test_a_full_disk_ends_a_run_with_its_checkpoint_whole(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = 0

    def fill(event: dict[str, Any]) -> None:
        nonlocal log
        if event["event"] == "checkpoint" and event["step"] == 10:
            log = (tmp_path / "log.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (log + 300, hard))

    try:
        with pytest.raises(ResourceError) as refused:
            fit(toy(checkpoint_every=5), tmp_path, on_event=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code == 4
    found, skipped = newest(tmp_path)
    assert found and found.state["step"] == 10 and not skipped
    assert fit(toy(checkpoint_every=5), tmp_path).steps == 20


# ---- damage


def test_a_damaged_checkpoint_is_skipped_and_said(tmp_path: Path) -> None:
    fit(toy(checkpoint_every=5), tmp_path)
    folder = tmp_path / "checkpoints"
    (tmp_path / "result.json").unlink()
    raw = bytearray((folder / "step-20" / "optim.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "step-20" / "optim.safetensors").write_bytes(raw)
    with pytest.warns(UserWarning, match="skipped step-20"):
        load(tmp_path)
    events: list[dict[str, Any]] = []
    fit(toy(checkpoint_every=5), tmp_path, on_event=events.append)
    assert events[0]["step"] == 15
    assert len(events[0]["skipped"]) == 1 and "optim.safetensors: size or hash differs" in events[0]["skipped"][0]


@pytest.mark.parametrize("part", [*module.PARTS, "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short", "long", "link", "fifo"])
def test_every_part_is_verified(tmp_path: Path, part: str, damage: str) -> None:
    save(tmp_path, 1, content(1, 10))
    save(tmp_path, 2, content(2, 10))
    path = tmp_path / "checkpoints" / "step-2" / part
    raw = path.read_bytes()
    path.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(raw)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes({"empty": b"", "short": raw[:-1], "long": raw + b"x"}[damage])
    found, skipped = newest(tmp_path)
    if part == "MANIFEST.json" and damage == "short":  # its last byte is the newline
        assert assert_whole(found) == 2
    else:
        assert assert_whole(found) == 1 and len(skipped) == 1 and skipped[0].startswith("step-2: ")


def test_a_linked_checkpoint_is_refused(tmp_path: Path) -> None:
    """Row 48."""
    (tmp_path / "a").mkdir()
    save(tmp_path / "a", 1, content(1, 10))
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "step-1").symlink_to(tmp_path / "a" / "checkpoints" / "step-1")
    found, skipped = newest(tmp_path / "b")
    assert found is None and "is a link" in skipped[0]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoints").symlink_to(tmp_path / "a" / "checkpoints")
    with pytest.raises(DataError, match="is a link"):
        newest(tmp_path / "c")
    (tmp_path / "elsewhere").write_text("mine")
    for name in ("lock", "log.jsonl"):
        run = tmp_path / f"e-{name}"
        run.mkdir()
        (run / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DataError, match=f"cannot write .*{name}"):
            fit(toy(), run)
    assert (tmp_path / "elsewhere").read_text() == "mine"
    (tmp_path / "d").symlink_to("d")
    with pytest.raises(DataError, match="link"):
        fit(toy(), tmp_path / "d")


def test_checkpoints_of_every_format_are_read() -> None:
    """F11: what a release has written is read forever. Add a folder when the format changes, remove none."""
    folders = sorted((Path(__file__).parent / "formats").iterdir())
    assert [f.name for f in folders] == [f"format-{i + 1}" for i in range(module.FORMAT)]
    for folder in folders:
        found, skipped = newest(folder)
        assert assert_whole(found) == 2 and not skipped


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    """Row 38: and never passed over for an older checkpoint."""
    fit(toy(checkpoint_every=5), tmp_path)
    path = tmp_path / "checkpoints" / "step-20" / "MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2, "statewise": "9.9"}))
    with pytest.raises(
        DataError, match=r"format 2, written by statewise 9\.9; this is .* up to format 1: upgrade"
    ) as refused:
        load(tmp_path)
    assert refused.value.code == 3


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a run: no experiment\.json"):
        load(tmp_path)
    fit(toy(), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(DataError, match="no usable checkpoint"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="it is a file"):
        fit(toy(), tmp_path / "file")
    (tmp_path / "experiment.json").write_text('{"task": 1, "task": 2}')
    with pytest.raises(UsageError, match="appears twice"):
        load(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Row 35."""
    experiment = toy()
    fit(experiment, tmp_path)
    found, _ = newest(tmp_path)
    assert found is not None
    found.model["decay"][0] = torch.nan
    save(tmp_path, 21, found)
    with pytest.raises(DataError, match="tensor 'decay' holds 1 values that are not finite"):
        load(tmp_path)
    assert load(tmp_path, allow_nonfinite=True)[0].decay.isnan().any()  # type: ignore[union-attr]


# ---- F9


def test_log_records_come_back(tmp_path: Path) -> None:
    records = [{"event": "train", "step": i, "loss": 1 / (i + 1), "name": 'ü "x"\n'} for i in range(10)]
    with Log(tmp_path / "log") as log:
        for record in records[:5]:
            log.write(record)
    assert read_log(tmp_path / "log")[0] == records[:5]
    _, offset = read_log(tmp_path / "log")
    with Log(tmp_path / "log") as log:
        for record in records[5:]:
            log.write(record)
    assert read_log(tmp_path / "log", offset)[0] == records[5:]
    assert read_log(tmp_path / "nothing") == ([], 0)


def test_a_torn_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [encode({"event": "train", "step": i, "loss": 0.5}) for i in range(3)]
    for cut in range(1, len(lines[2])):
        path.write_bytes(lines[0] + lines[1] + lines[2][:cut])
        found, offset = read_log(path)
        assert [r["step"] for r in found] == [0, 1] and offset == len(lines[0] + lines[1])
        with Log(path) as log:
            log.write({"event": "done", "step": 9})
        whole = [2] if cut == len(lines[2]) - 1 else []  # only its newline was missing
        assert [r["step"] for r in read_log(path)[0]] == [0, 1, *whole, 9]


def test_a_flipped_bit_in_the_log_is_seen() -> None:
    line = encode({"event": "train", "step": 17, "loss": 0.125})
    assert decode(line) == {"event": "train", "step": 17, "loss": 0.125}
    for bit in range(8 * (len(line) - 1)):
        damaged = bytearray(line)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode(bytes(damaged)) is None


def test_killed_writers_leave_whole_records(tmp_path: Path) -> None:
    rng, count = random.Random(4), 0
    for _ in range(30):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with Log(tmp_path / "log") as log:
                    for i in range(10**6):
                        log.write({"event": "train", "step": i, "text": "x" * 500})
                        if i == 1:
                            os.write(writer, b"!")  # it is at work
            finally:
                os._exit(98)
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert pipe.read(1)
        time.sleep(rng.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        records, _ = read_log(tmp_path / "log")
        assert len(records) >= count
        count = len(records)
    lines = (tmp_path / "log").read_bytes().count(b"\n")
    assert count > 30 and lines - count <= 30


def test_numbers_that_are_not_finite_are_logged_as_words() -> None:
    assert decode(encode({"event": "failed", "loss": float("nan"), "m": {"a": float("inf")}})) == {
        "event": "failed",
        "loss": "nan",
        "m": {"a": "inf"},
    }


# ---- short writes


def test_a_short_write_goes_on_and_a_torn_line_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "log.jsonl", os.write
    with Log(path) as log:
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:7])))
        log.write({"event": "a", "step": 1})
        monkeypatch.setattr(os, "write", lambda fd, data: _full(fd, data, write))
        with pytest.raises(ResourceError):
            log.write({"event": "b", "step": 2})
        monkeypatch.undo()
        log.write({"event": "c", "step": 3})
    path.write_bytes(path.read_bytes() + b'{"event": "d"')
    with Log(path) as log:
        log.write({"event": "e", "step": 5})
    assert [r["step"] for r in read_log(path)[0]] == [1, 3, 5]


def _full(fd: int, data: Any, write: Callable[..., int]) -> int:
    """Takes some of a line, then nothing."""
    if data[:1] != b"{":
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(fd, bytes(data[:9]))
