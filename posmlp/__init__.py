"""The PosMLP family of vision models, built on `posmlp_kernels`.

Names are imported when they are first used, because the command line's help should not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import timm_models

if TYPE_CHECKING:
    from .cost import complexity
    from .model import PosMLP
    from .registry import create_model, list_models
    from .transfer import transfer_weights
    from .weights import from_original, load_checkpoint, save_checkpoint

__all__ = [
    "PosMLP",
    "complexity",
    "create_model",
    "from_original",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
    "transfer_weights",
]

_HOMES = {
    "PosMLP": "model",
    "complexity": "cost",
    "create_model": "registry",
    "list_models": "registry",
    "from_original": "weights",
    "load_checkpoint": "weights",
    "save_checkpoint": "weights",
    "transfer_weights": "transfer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


timm_models.register_when_imported()
