"""How much memory there is."""

from __future__ import annotations

import os

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


def free_memory() -> int | None:
    """Bytes that can be had without swapping, or up to the limit set for this process; None where nothing says."""
    told = []
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        told.append(limit)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            facts = dict(line.split(":") for line in lines)
        told.append(int(facts["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
            told.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(told, default=None)
