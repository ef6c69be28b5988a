"""transformers has an xLSTM of its own, which it leaves where the authors' package is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest import mock


def without_the_xlstm_package() -> ModuleType:
    """transformers' xLSTM as it is where the authors' package, which it prefers to its own code, is not installed."""
    utils = importlib.import_module("transformers.utils")
    spec = importlib.util.find_spec("transformers.models.xlstm.modeling_xlstm")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # where its own classes look for it
    try:
        with mock.patch.object(utils, "is_xlstm_available", lambda: False):
            spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
        if before is not None:
            sys.modules[spec.name] = before
    return module
