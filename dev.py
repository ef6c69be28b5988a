#!/usr/bin/env python3
"""Set up an environment beside this file and run something in it. Needs Python 3.11 or later and nothing else.

python3 dev.py demo     train five recurrent layers on spoken digits, compare them, write the report
python3 dev.py test     ruff, mypy and the fast tests            (--with triton: its interpreter tests too;
                        --with peers: other implementations, to compare ours with)
python3 dev.py slow     the tests marked slow, 40 minutes
python3 dev.py docs     build the documentation into site/
python3 dev.py bench    time the kernels and layers on this machine
python3 dev.py run ...  any statewise command, for example: python3 dev.py run list
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENV = HERE / ".venv"
BIN = ENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
TORCH = "torch==2.13.0"
DEMO = ["spoken_digits", "--layers", "gru,lstm,lru,s5,min_gru", "--out", "runs/demo"]


# Bytecode is kept whatever the caller says: without it every process would compile torch anew, which takes seconds.
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}


def call(*command: object, quiet: bool = False) -> int:
    """Run a command from the repository's root; returns its exit status."""
    line = [str(part) for part in command]
    return subprocess.run(line, cwd=HERE, env=ENVIRONMENT, stdout=subprocess.DEVNULL if quiet else None).returncode


def need(*command: object) -> None:
    """Run a command that must succeed."""
    if status := call(*command, quiet=True):
        sys.exit(f"dev.py: exit status {status} from: {' '.join(map(str, command))}")


def fingerprint(extras: list[str]) -> str:
    """What the environment was made from; it is made anew when this changes."""
    files = [HERE / "pyproject.toml", HERE / "constraints.txt", Path(__file__)]
    text = b"".join(f.read_bytes() for f in files) + repr((sys.version, sorted(extras))).encode()
    return hashlib.sha256(text).hexdigest()


def setup(extras: list[str]) -> None:
    """A virtual environment with torch, the library in place (editable) and the wanted extras."""
    stamp = ENV / "statewise.json"
    made = json.loads(stamp.read_text()) if stamp.exists() else {}
    extras = sorted({*extras, *made.get("extras", [])})
    if made.get("fingerprint") == fingerprint(extras):
        return
    began = time.perf_counter()
    print(f"setting up {ENV.name} ({', '.join(extras)}) ...", flush=True)
    if not PYTHON.exists():
        venv.create(ENV, with_pip=True)
    pip = [PYTHON, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", "-c", "constraints.txt"]
    need(*pip, TORCH)  # by pip, which knows where this machine keeps its torch build
    target = f".[{','.join(extras)}]"
    uv = BIN / "uv"
    fast = not call(*pip, "uv", quiet=True) and not call(
        uv, "pip", "install", "-q", "--python", PYTHON, "-c", "constraints.txt", "-e", target, quiet=True
    )
    if not fast:
        need(*pip, "-e", target)
    stamp.write_text(json.dumps({"fingerprint": fingerprint(extras), "extras": extras}))
    print(f"ready in {time.perf_counter() - began:.0f} s", flush=True)


def test(extra: list[str]) -> int:
    """Style, types, then the fast tests on every core. The last lines are pytest's.

    worksteal: each process begins with a stretch of its own, so that two seldom compile the same kernel at a time.
    """
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        if status := call(PYTHON, "-m", *command):
            return status
    return call(PYTHON, "-m", "pytest", "-n", os.cpu_count() or 1, "--dist=worksteal", "-m", "not slow", *extra)


def demo(extra: list[str]) -> int:
    """The main job on real recordings."""
    return call(PYTHON, "-m", "statewise", "data", "get", "spoken_digits") or call(
        PYTHON, "-m", "statewise", "compare", *DEMO, *extra
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["setup", "demo", "test", "slow", "docs", "bench", "run"])
    parser.add_argument("--with", dest="extras", action="append", default=[], metavar="EXTRA", help="install an extra")
    options, extra = parser.parse_known_args()
    if sys.version_info < (3, 11):  # noqa: UP036  this file is what older ones are told by
        sys.exit(f"dev.py: Python 3.11 or later is needed; this is {sys.version.split()[0]}")
    setup(["dev", *options.extras, *(["docs"] if options.verb == "docs" else [])])
    if options.verb == "test":
        return test(extra)
    if options.verb == "slow":
        return call(PYTHON, "-m", "pytest", "-n", "1", "-m", "slow", "--timeout=1800", *extra)
    if options.verb == "demo":
        return demo(extra)
    if options.verb == "docs":
        return call(BIN / "zensical", "build", *extra)
    if options.verb == "bench":
        return call(PYTHON, "-m", "statewise", "bench", *(extra or ["linear_scan"]))
    if options.verb == "run":
        return call(PYTHON, "-m", "statewise", *extra)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
