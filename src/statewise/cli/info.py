"""statewise info: versions, devices and backends, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REQUIRED = ("torch", "numpy", "numba", "safetensors", "tyro", "rich")
OPTIONAL = ("triton", "scikit-learn", "pyarrow", "jinja2", "tensorboard", "onnx", "onnxruntime")
SETTINGS = ("STATEWISE_BACKEND", "STATEWISE_DATA", "OMP_NUM_THREADS", "NUMBA_CACHE_DIR")


@dataclass(frozen=True)
class Options:
    """Print versions, devices, threads, backends and cache places: paste it into a bug report."""


def run(options: Options) -> int:
    import torch

    from .. import __version__
    from ..core.machine import cores, free_memory
    from ..ops import linear_scan, ops
    from ..report import show_bytes
    from ..tasks.sources import cache

    say("statewise", f"{__version__} in {Path(__file__).parents[1]}")
    say("python", f"{platform.python_version()}, {sys.executable}")
    say("system", platform.platform())
    for package in REQUIRED:
        say(package, version(package) or "not installed")
    found = [f"{package} {version(package)}" for package in OPTIONAL if version(package)]
    say("optional", ", ".join(found) or "none")
    say("not installed", ", ".join(package for package in OPTIONAL if not version(package)) or "none")
    say("cores", f"{cores()}, torch on {torch.get_num_threads()} threads, load average {load()}")
    say("free memory", show_bytes(free_memory()))
    say("devices", ", ".join(devices()))
    for name, op in sorted(ops.items()):
        say(name, ", ".join([*op.backends, "reference"]))
    for device in dict.fromkeys(name.split(":")[0].split()[0] for name in devices()):
        call = next(iter(linear_scan.samples(device, torch.float32)))
        for backend, reason in linear_scan.explain(**call).items():
            say(f"  {backend}", f"on {device}: {'runs' if reason == 'ok' else reason}")
    say("data cache", str(cache()))
    say("numba cache", os.environ.get("NUMBA_CACHE_DIR") or "beside the kernels, or in the user's cache folder")
    say("set", ", ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ) or "nothing")
    return 0


def say(name: str, what: str) -> None:
    print(f"{name:<14} {what}")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def devices() -> list[str]:
    import torch

    gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus]
