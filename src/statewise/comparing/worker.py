"""A process that trains one cell: python -m statewise.comparing.worker RUN --threads 1 < record.

The first line of standard input is the experiment's record. The end of standard input means that the driver is gone:
the run is then saved and ended, as by SIGTERM. A failure is one line on standard error and an exit status.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=int, default=0, help="limit of the address space in bytes")
    parser.add_argument("--lengths", default="", help="of test examples to score the trained model at: 40,80")
    options = parser.parse_args()
    record = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_driver, daemon=True).start()

    import torch

    from ..core import StatewiseError
    from ..core.errors import out_of_memory
    from ..tasks import Generated
    from ..training import Experiment, OtherData, add_lengths, fit

    torch.set_num_threads(options.threads)
    if options.memory:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (options.memory, options.memory))
    try:
        experiment = Experiment.from_record(record)
        common: dict[str, Any] = {"device": options.device, "signals": True, "tensorboard": False}
        try:
            fit(experiment, options.run, **common)
        except OtherData:  # the file has changed since: what it gave before stands for nothing
            fit(experiment, options.run, resume=False, **common)
        if options.lengths and isinstance(experiment.task, Generated):
            asked = [int(part) for part in options.lengths.split(",")]
            add_lengths(options.run, asked, device=options.device, refuse=False)
    except StatewiseError as error:
        return _fail(error.code, str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        words = str(error).strip() or type(error).__name__
        if out_of_memory(error):
            return _fail(4, f"out of memory: {words.splitlines()[0][:150]}")
        raise
    return 0


def _fail(code: int, words: str) -> int:
    print(f"error[{code}]: {' '.join(words.split())}", file=sys.stderr, flush=True)
    return code


def _end_with_driver() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread blocked in it would hold its lock at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
