"""Several processes that talk over gloo on this machine, for tests."""

from __future__ import annotations

import socket
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def copies() -> Any:
    """The processes of multiprocessing, as copies of one that has imported what takes seconds to import."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.fsdp", "numba", "statewise.layers", "statewise.comparing.worker"]
    )
    return context


def in_ranks(size: int, work: Callable[..., None], *args: Any, seconds: float = 250) -> None:
    """work(*args) in `size` new processes of one group; fails with the first traceback, or after `seconds`."""
    context = copies()
    errors = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as meet:  # not at a port: another test may take one that was free a moment ago
        given = (size, f"file://{meet}/store", errors, work, args)
        started = [context.Process(target=_work, args=(rank, *given), daemon=True) for rank in range(size)]
        for p in started:
            p.start()
        try:
            for p in started:
                p.join(seconds)
            assert errors.empty(), errors.get()
            assert [p.exitcode for p in started] == [0] * size
        finally:
            for p in started:
                p.kill()


def _work(rank: int, size: int, meet: str, errors: Any, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
        work(*args)
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
