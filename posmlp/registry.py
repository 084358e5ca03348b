"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
from typing import Any

from .model import PosMLP

_T = {"depths": (2, 2, 18, 2), "windows": (14, 14, 14, 7), "groups": (8, 16, 32, 64), "ratios": (4, 4, 4, 2)}
_POSMLP = {
    "posmlp_nano": {
        "dims": (48, 96),
        "depths": (2, 2),
        "windows": (8, 4),
        "groups": (8, 16),
        "ratios": (4, 4),
        "num_classes": 10,
        "img_size": 32,
    },
    "posmlp_tiny": {"dims": (96, 192, 384, 768), **_T},
    "posmlp_small": {"dims": (128, 256, 512, 1024), **_T},
    "posmlp_base": {"dims": (192, 384, 768, 1536), **_T},
}
_GMLP = {"dims": (256,), "depths": 30, "windows": 14, "groups": 1, "ratios": 6, "patch_size": 16}

# What a name's ending changes. A table of one group is LRPE, of several groups GLRPE.
_ENDINGS = {
    "gqpe_isotropic": {"encoding": "gqpe_isotropic"},
    "lrpe": {"encoding": "lrpe", "groups": 1},
    "glrpe": {"encoding": "lrpe"},
    "lrpe_m": {"encoding": "lrpe_m", "groups": 1},
    "sgu": {"encoding": "sgu", "groups": 1},
}

CONFIGS: dict[str, dict[str, Any]] = {
    **_POSMLP,
    **{
        f"{name}_{end}": config | change
        for name, config in _POSMLP.items()
        for end, change in _ENDINGS.items()
    },
    **{f"gmlp_s16_{end}": _GMLP | _ENDINGS[end] for end in ("sgu", "lrpe", "lrpe_m")},
    "gmlp_s16_glrpe": _GMLP | {"encoding": "lrpe", "groups": 32},
    "gmlp_s16_ggqpe": _GMLP | {"encoding": "gqpe", "groups": 32},
}


def list_models(pattern: str | None = None) -> list[str]:
    """The names that `create_model` knows, all or those that match a shell pattern such as "*tiny*"."""
    return sorted(CONFIGS if pattern is None else fnmatch.filter(CONFIGS, pattern))


def create_model(name: str, checkpoint_path: str | os.PathLike | None = None, **overrides: Any) -> PosMLP:
    """The named model, with random weights or those of a checkpoint (see `load_checkpoint`).

    `overrides` are arguments of `PosMLP`; they win over the name's own.
    Raises: `ValueError` for an unknown name or for a checkpoint that does not fit, `TypeError` for an unknown
    override; both list what exists.
    """
    cfg = default_cfg(name)
    options = list(inspect.signature(PosMLP).parameters)
    for option in overrides:
        if option not in options:
            raise TypeError(f"{name} has no option {option!r}; {_suggest(option, options)}")
    config = CONFIGS[name] | overrides
    model = PosMLP(**config)
    model.default_cfg = model.pretrained_cfg = cfg | {
        "num_classes": model.num_classes,
        "input_size": (model.in_chans, *cfg["input_size"][1:]),
    }
    if checkpoint_path is not None:
        from .weights import load_checkpoint

        load_checkpoint(model, checkpoint_path)
    return model


def default_cfg(name: str) -> dict[str, Any]:
    """How images reach a named model, in timm's terms: their size, ImageNet's mean and deviation.

    Raises: `ValueError` for an unknown name, which lists what exists.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}; {_suggest(name, list_models())}")
    config = CONFIGS[name]
    size = config.get("img_size", 224)
    return {
        "architecture": name,
        "input_size": (3, size, size),
        "num_classes": config.get("num_classes", 1000),
        "interpolation": "bicubic",
        "crop_pct": 0.9 if size > 64 else 1.0,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1",
        "classifier": "head",
        "license": "mit",
    }


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"known are {', '.join(known)}"
