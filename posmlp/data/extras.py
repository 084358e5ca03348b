"""Packages that only an extra installs, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional(name: str, extra: str = "demo") -> ModuleType:
    """Import a module that only an extra of the package installs.

    Raises: `ImportError` that names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(name.split(".")[0], name.split(".")[0])
        raise ImportError(f'{package} is missing: pip install "posmlp-kernels[{extra}]"') from error
