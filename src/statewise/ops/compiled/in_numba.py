"""How loops are compiled and kept for the next process."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic


def function(function: Callable[..., Any], **options: Any) -> Any:
    """numba.njit, cached beside its file, else in the user's cache directory, else not at all.

    Numba takes a cache for fresh as long as the file of the function is what it was. Code of other files is compiled
    into it: here they count too. And it compiles a function once more for each constant among its arguments, with all
    that this calls: here a constant is a number like others.
    """
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        _keep(compiled, function)
    except RuntimeError:  # no directory can be written
        compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    template = compiled.get_call_template
    compiled.get_call_template = lambda args, kws: template(
        tuple(map(types.unliteral, args)), {name: types.unliteral(kind) for name, kind in kws.items()}
    )
    return compiled


@functools.cache
def entry(function: Callable[..., int], words: int) -> CFunc:
    """A function of so many integers, compiled, whose `address` other compiled code can `reach`, at any time.

    What calls a function in the ordinary way is compiled together with it and all that it calls; this is compiled once.
    """
    made = CFunc(function, ((types.intp,) * words, types.intp), {}, {"error_model": "numpy"})
    try:
        made.enable_caching()
        _keep(made, function)
    except RuntimeError:  # no directory can be written
        made._cache = NullCache()
    made.compile()
    return made


@intrinsic
def reach(context, address, words):
    """What the code at an address makes of integers."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * len(words))
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), cgutils.unpack_tuple(builder, args[1]))

    return types.intp(types.intp, words), generate


def _keep(compiled: Any, function: Callable[..., Any]) -> None:
    cache = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache is not None:
        cache._source_stamp = _stamp(function.__module__)


@functools.cache
def _stamp(module: str) -> tuple[tuple[int, int], ...]:
    """Times and sizes of the module's file and of those of compiled code that it imports or imports from, and so on."""
    found = [sys.modules[module]]
    for one in found:  # grows
        names = [n.__name__ if isinstance(n, ModuleType) else getattr(n, "__module__", "") for n in vars(one).values()]
        ours = [sys.modules[n] for n in dict.fromkeys(names) if n in sys.modules and "in_numba" in n]
        found += [n for n in ours if n not in found]
    files = [os.stat(one.__file__) for one in found if one.__file__]
    return tuple((f.st_mtime_ns, f.st_size) for f in files)


@intrinsic
def apart(context):
    """Keep the function that calls this out of its callers, and small: compiling takes a third of the time."""

    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), generate
