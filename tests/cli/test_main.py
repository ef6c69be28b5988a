"""The entry: help without torch, versions, errors in one line, and what a signal or a closed pipe does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from statewise.cli import VERBS, explain_error, main, show_warning
from statewise.core import NumericError, ResourceError, Unknown, UsageError

PYTHON = [sys.executable, "-m", "statewise"]


def test_the_verbs_are_there():
    assert {"list", "train", "stream", "check", "explain", "bench", "info"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"usage: statewise {verb}" in out and not err
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_options_and_run(verb):
    module = import_module(f"statewise.cli.{verb}")
    assert module.Options.__doc__ and not module.Options.__doc__.startswith("Options(")
    assert callable(module.run)


def test_help_does_not_import_torch():
    code = (
        "import sys, statewise.cli as c\n"
        "for verb in [None, *c.VERBS]: c.main([*([verb] if verb else []), '--help'])\n"
        "c.main(['--version']); c.main(['train', '--lyer', 'gru']); c.main(['trian'])\n"
        "heavy = {'torch', 'numpy', 'numba', 'matplotlib', 'safetensors', 'rich'} & set(sys.modules)\n"
        "import time; print('\\n', time.process_time())\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain())
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 10  # seconds of processor time; one here


def test_top_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)
    assert max(map(len, out.splitlines())) <= 80
    assert main([]) == 2


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("statewise 0.")


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UsageError("wrong"), 2, "wrong"),
        (Unknown("unknown layer 'x'"), 2, "unknown layer"),
        (ResourceError("disk"), 4, "disk"),
        (NumericError("nan"), 5, "nan"),
        (MemoryError(), 4, "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            4,
            "8",
        ),
        (OSError(28, "No space left on device", "x.bin"), 4, "No space left on device: x.bin"),
        (PermissionError(13, "Permission denied", "x"), 3, "Permission denied"),
        (FileNotFoundError(2, "No such file or directory", "gone.csv"), 3, "gone.csv"),
        (ZeroDivisionError("division by zero\nsecond line"), 1, "--debug"),
    ],
)
def test_every_error_has_a_code_and_one_line(error, code, part):
    found, message = explain_error(error)
    assert (found, part in message) == (code, True)


def test_an_unforeseen_error_is_one_line_and_debug_shows_more(monkeypatch, capsys):
    def broken(options):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(import_module("statewise.cli.list"), "run", broken)
    assert main(["list"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error[1]: ZeroDivisionError")
    assert main(["list", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_warning_is_one_line(capsys):
    show_warning(UserWarning("a tensor of\n  many"), UserWarning, "place.py", 7)
    assert capsys.readouterr().err == "warning: a tensor of many\n"


def test_streams_that_are_closed_are_done_without(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["--version"]) == 0 and main(["nothing"]) == 2


def test_ctrl_c_is_130_and_quiet(monkeypatch, capsys):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("statewise.cli.list"), "run", stopped)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_ends_quietly():
    with subprocess.Popen([*PYTHON, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=plain()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_info_in_the_c_locale_without_a_terminal(tmp_path: Path):
    done = subprocess.run([*PYTHON, "info"], capture_output=True, text=True, env=plain(LC_ALL="C", TERM=""))
    assert done.returncode == 0, done.stderr
    for part in ("statewise ", "torch ", "linear_scan", "devices        cpu", "data cache"):
        assert part in done.stdout
    assert "\x1b" not in done.stdout


def plain(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("FORCE_COLOR", "COLUMNS"))}, **more}


@pytest.mark.slow
def test_out_of_memory_is_exit_4(tmp_path: Path):
    many = ["--set", "train.batch=60000", "train.steps=2", "task.length=200"]
    words = ["train", "adding", "--layer", "elman", "--width", "512", "--run", str(tmp_path / "run"), *many]
    limited = ["bash", "-c", 'ulimit -v 6000000; exec "$@"', "limited", *PYTHON, *words, "--device", "cpu"]
    done = subprocess.run(limited, capture_output=True, text=True, env=plain(OMP_NUM_THREADS="1"))
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error[4]: ") and "batch" in done.stderr
