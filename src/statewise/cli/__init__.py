"""The command line: `statewise VERB ...`. One file per verb, imported when the verb is called, torch later still.

A verb is a module of this package with `Options`, a frozen dataclass that tyro turns into flags, and
`run(options) -> int`, which returns the exit status. To add one: write cli/NAME.py and its line in VERBS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

VERBS = {  # in the order of --help
    "list": "layers, tasks, models and ops",
    "train": "train one model on one task, or on your own data",
    "compare": "layers x tasks x hyperparameters x seeds, and a report",
    "results": "pick, group, sort and export the runs of comparisons",
    "stream": "answer standard input line by line with a trained run",
    "generate": "write on from a prompt with a run trained on text",
    "export": "a trained run's step as ONNX or torch.export",
    "check": "the conformance suite on a layer, your own or a registered one",
    "explain": "what a layer is and costs; which backend it or an op takes",
    "reproduce": "a paper's experiments, and which of its claims hold",
    "papers": "every paper, its claims, the measured numbers",
    "bench": "speed and memory, beside what else there is",
    "data": "real data sets: list them, get them, say where they are",
    "info": "versions, devices, backends and cache places, for a bug report",
}

HELP = """usage: statewise VERB [OPTIONS]

Recurrent sequence models: write a recurrence once, train it in parallel,
stream it in constant memory.

verbs:
{verbs}

statewise VERB --help   says what a verb takes
statewise --version     prints the version
--debug                 after any verb: the traceback of an error
"""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOMEM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 a check failed or an unforeseen error, 2 usage, 3 data,
    4 disk or memory, 5 a number that is not finite, 130 and 143 stopped by a signal."""
    args = [*(sys.argv[1:] if argv is None else argv)]  # `list` is a verb here once it has been imported
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for out in (sys.stdout, sys.stderr):
        if hasattr(out, "reconfigure"):
            out.reconfigure(errors="backslashreplace")  # a path that is not UTF-8 must not end the run
    if argv is None:  # the process is ours
        warnings.showwarning = show_warning
    try:
        status = _dispatch(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # or the interpreter complains again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = explain_error(error)
        return fail(code, message)


def fail(code: int, message: str) -> int:
    """The one line that every error ends in."""
    sys.stdout.flush()
    print(f"error[{code}]: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning of torch or numpy in one line, without the place in the code where it arose."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def explain_error(error: Exception) -> tuple[int, str]:
    """Exit status and words. Looks at the class without importing it: errors may come before torch is loaded."""
    text = str(error) or type(error).__name__
    errors = sys.modules.get("statewise.core.errors")
    if errors is not None and isinstance(error, errors.StatewiseError):
        return error.code, text
    if isinstance(error, MemoryError) or (errors is not None and errors.out_of_memory(error)):
        return 4, f"out of memory: {text.splitlines()[0][:150]}; try a smaller batch, length or width"
    if isinstance(error, OSError) and error.errno in FULL:
        return 4, f"{error.strerror}: {error.filename or 'while writing'}; free some space and run again"
    if isinstance(error, FileNotFoundError):
        return 3, f"no such file: {error.filename!r}, looked for from {os.getcwd()}"
    if isinstance(error, OSError) and error.filename:
        return 3, f"{error.strerror}: {error.filename!r}"
    return 1, f"{type(error).__name__}: {text.splitlines()[0][:150]}; run again with --debug for the traceback"


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(HELP.format(verbs="\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())), end="")
        return 0 if args else 2
    if args[0] in ("--version", "-V"):
        from .. import __version__

        print(f"statewise {__version__}")
        return 0
    verb, *rest = args
    if verb not in VERBS:
        from .parse import nearest

        return fail(2, f"unknown verb {verb!r}; {nearest(verb, VERBS)}; see statewise --help")
    from .parse import Wrong, parse

    module = import_module(f".{verb}", __name__)
    try:
        options = parse(verb, module.Options, rest)
    except Wrong as error:
        return fail(2, f"{verb}: {error}")
    return 0 if options is None else int(module.run(options))
