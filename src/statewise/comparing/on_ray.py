"""Cells on a Ray cluster: the same workers, started by Ray tasks on whichever node has processors free.

The results folder must be one that every node sees, as a home directory on a cluster is: workers keep their checkpoints
there, and the driver follows them by their logs, as it does on one machine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from ..core import UsageError
from ..core.machine import locked
from .launch import Setup, spawn

PATIENCE = 60.0  # seconds for the worker of an earlier driver to save and leave a run folder


class OnRay:
    """Tasks on a cluster to which `connect` has connected."""

    name = "ray"

    def __init__(self, setup: Setup):
        self.ray = load()
        gpus = 1 if setup.device.startswith("cuda") else 0
        # the pool itself starts again what died, from its last checkpoint
        self.work = self.ray.remote(num_cpus=setup.threads, num_gpus=gpus, max_retries=0)(work)

    def start(self, record: dict[str, Any], place: Path, setup: Setup, lock: int) -> Task:
        place.mkdir(parents=True, exist_ok=True)
        return Task(self.ray, self.work.remote(record, str(place.absolute()), setup))


def connect(cpus: int) -> int:
    """Connect to the cluster that RAY_ADDRESS names, else start one of that many processors on this machine; returns
    the processors of the cluster. A connection that there is already is used.

    Raises UsageError where there is no such cluster, and where Ray is not installed.
    """
    ray = load()
    if not ray.is_initialized():
        own: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level="error", **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"--engine ray: no cluster: {' '.join(str(error).split())[:200]}") from None
    return int(ray.cluster_resources().get("CPU", 1))


def load() -> Any:
    """Ray. Raises UsageError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a comparison opens no connection that was not asked for
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'statewise[ray]'") from None
    return ray


def work(record: dict[str, Any], place: str, setup: Setup) -> int:
    """On a node: train one cell in a process of its own; returns its exit status. Cancelled, asks it to save."""
    folder, end = Path(place), time.monotonic() + PATIENCE
    while time.monotonic() < end:  # until what an earlier driver left has let go of the folder
        with contextlib.suppress(UsageError), locked(folder):
            break
        time.sleep(0.2)
    process = spawn(record, folder, setup, [])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()


class Task:
    """The task that runs a worker, with the ways of a process."""

    def __init__(self, ray: Any, ref: Any):
        self.ray, self.ref = ray, ref
        self.status: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def terminate(self) -> None:
        self.ray.cancel(self.ref, force=False)

    def kill(self) -> None:
        self.ray.cancel(self.ref, force=True)  # and the end of its input ends the worker

    def wait(self, timeout: float | None = None) -> int:
        if self.status is None:
            done, _ = self.ray.wait([self.ref], timeout=timeout)
            if not done:
                raise subprocess.TimeoutExpired("ray task", timeout or 0)
            try:
                self.status = int(self.ray.get(self.ref))
            except self.ray.exceptions.TaskCancelledError:
                self.status = -15
            except self.ray.exceptions.RayError:  # the node or its process died, or its memory ran out
                self.status = -9
        return self.status
