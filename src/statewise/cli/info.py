"""statewise info: versions, devices and backends, for a bug report."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REQUIRED = ("torch", "numpy", "numba", "safetensors", "tyro", "rich")
OPTIONAL = ("triton", "scikit-learn", "pyarrow", "matplotlib", "jinja2", "tensorboard", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Options:
    """Print versions, devices, threads, backends and cache places: paste it into a bug report."""


def run(options: Options) -> int:

    from .. import __version__

    print(f"statewise    {__version__}  ({Path(__file__).parents[1]})")
    print(f"python       {platform.python_version()}  ({sys.executable})")
    print(f"system       {platform.platform()}")
    for package in REQUIRED + OPTIONAL:
        print(f"{package:<12} {version(package) or 'not installed'}")
    return 0


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
