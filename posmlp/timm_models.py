"""The models under timm's registry: `timm.create_model("posmlp_tiny")` after `import posmlp`.

timm takes seconds to import and is optional, so nothing here imports it, nor torch: registration waits until
somebody else does.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__: list[str] = []
default_cfgs: dict[str, dict[str, Any]] = {}  # where timm's registry looks for them


def register_when_imported() -> None:
    """Register all models with timm, at once if it has been imported, else as soon as it is."""
    if "timm.models" in sys.modules:
        _register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    """Stands in front of the usual finders until `timm.models` is asked for, and has it register ours."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    try:
        from timm.models import register_model

        from .registry import default_cfg, list_models

        for name in list_models():
            default_cfgs[name] = default_cfg(name)
            globals()[name] = register_model(_entrypoint(name))  # timm adds the name to __all__
    except Exception as error:  # importing timm must work whatever its version
        warnings.warn(f"posmlp could not register its models with timm: {error}", stacklevel=2)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        from .registry import CONFIGS, create_model

        if pretrained:
            raise ValueError(f"{name} has no pretrained weights to download; give checkpoint_path= a file")
        levels = tuple(range(len(kwargs.get("dims", CONFIGS[name]["dims"]))))
        features = {"feature_cls": "getter", "flatten_sequential": True, "out_indices": levels}
        return build_model_with_cfg(
            lambda **overrides: create_model(name, **overrides), name, False, feature_cfg=features, **kwargs
        )

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"`{name}` of posmlp; keyword arguments are those of `PosMLP`."
    return build
