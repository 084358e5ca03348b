"""Checkpoints: reading the original's and ours, writing ours."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import write_whole

# The original's modules and ours, in the order in which they apply to a name.
_RENAMES = (
    (r"^patch_embed\.projs\.(\d)\.", lambda m: f"stem.conv{int(m[1]) + 1}."),
    (r"^patch_embed\.norms\.(\d)\.", lambda m: f"stem.norm{int(m[1]) + 1}."),
    (r"^absolute_pos_embed$", "stem.position.weight"),
    (r"^levels\.(\d+)\.pool\.", r"levels.\1.downsample."),
    (r"^levels\.(\d+)\.encoder\.", r"levels.\1.blocks."),
    (r"\.proj_c_e\.", ".fc1."),
    (r"\.proj_c_s\.", ".fc2."),
    (r"\.gate_unit\.(?:pos\.)?", ".gate."),
    (r"\.gate\.attention_centers$", ".gate.center"),
    (r"\.gate\.attention_spreads$", ".gate.factor"),
    (r"\.gate\.window_relative_position_bias_table$", ".gate.table"),
    (r"\.gate\.token_proj_n_weight$", ".gate.matrix"),
    (r"\.gate\.token_proj_n_bias$", ".gate.bias"),
    (r"\.gate\.proj_list\.0\.weight$", ".gate.matrix"),
    (r"\.gate\.proj_list\.0\.bias$", ".gate.bias"),
    (r"\.gate\.norm_list\.0\.", ".gate.norm."),
)
_BUFFERS = ("rel_indices", "_index")  # endings of what the original stores, though it follows from the window
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
)  # where trainers keep weights; averages first
_SHOWN = 5  # differences that an error spells out


def is_original(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has the names of the authors' released code."""
    return any(".proj_c_e." in name for name in state_dict)


def from_original(state_dict: Mapping[str, Tensor], *, symmetric: bool = True) -> dict[str, Tensor]:
    """The state dict of the authors' released PosMLP, in the names and conventions of this one.

    There channel `c` belongs to group `c mod S`, a displacement's coordinates are (column, minus row), and a
    learned table is flat, `[(2h-1)(2w-1), S]`, by query minus key. All of it goes into the weights here.

    Args:
        state_dict: the original's, without wrapper or prefix.
        symmetric: False for models of its `symmetric=False`, whose spread is the inverse covariance itself.

    Raises: `ValueError` for a layer that no gate of `PosSGU` can express.
    """
    out = {_rename(name): value for name, value in state_dict.items() if not name.endswith(_BUFFERS)}
    for name in [name for name in out if name.endswith(".fc1.weight")]:
        _convert_block(out, name.removesuffix("fc1.weight"), symmetric)
    if "stem.position.weight" in out:  # the original views its [1, N, C] as [1, C, h, w]
        embedding = out["stem.position.weight"]
        side = math.isqrt(embedding.shape[1])
        out["stem.position.weight"] = embedding.reshape(1, -1, side, side)
    return out


def _rename(name: str) -> str:
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    return name


def _convert_block(state: dict[str, Tensor], block: str, symmetric: bool) -> None:
    """Convert the entries under one block's prefix in place."""
    gate, groups = f"{block}gate.", 1
    if f"{gate}center" in state:
        groups = len(state[f"{gate}center"])
        _convert_quadratic(state, gate, symmetric)
    elif f"{gate}table" in state:
        groups = state[f"{gate}table"].shape[1]
        side = math.isqrt(len(state[f"{gate}table"]))
        state[f"{gate}table"] = state[f"{gate}table"].T.unflatten(1, (side, side)).flip(1, 2)
    for name in ("bias", "matrix"):
        if f"{gate}{name}" in state:
            tokens = state[f"{gate}{name}"].shape[1 if state[f"{gate}{name}"].dim() > 1 else 0]
            state[f"{gate}{name}"] = state[f"{gate}{name}"].reshape((tokens,) * (1 if name == "bias" else 2))

    channels = state[f"{block}fc2.weight"].shape[1]
    if channels % groups or len(state[f"{block}fc1.weight"]) != 2 * channels:
        raise ValueError(f"{block}fc1 must be [2C, d] for C = {channels} in {groups} groups")
    order = torch.arange(channels).view(-1, groups).T.flatten()  # group by group rather than interleaved
    both = torch.cat([order, order + channels])
    state[f"{block}fc1.weight"] = state[f"{block}fc1.weight"][both]
    state[f"{block}fc1.bias"] = state[f"{block}fc1.bias"][both]
    state[f"{block}fc2.weight"] = state[f"{block}fc2.weight"][:, order]
    for name in (f"{gate}norm.weight", f"{gate}norm.bias"):
        if name in state:
            state[name] = state[name][order]


def _convert_quadratic(state: dict[str, Tensor], gate: str, symmetric: bool) -> None:
    center, factor = state[f"{gate}center"], state.pop(f"{gate}factor")
    if factor.dim() == 1:
        state[f"{gate}scale"] = factor
    else:
        if not symmetric:
            center, factor = _symmetric(gate, center, factor)
        state[f"{gate}factor"] = _from_pair(factor)
    state[f"{gate}center"] = _from_pair(center.unsqueeze(-1)).squeeze(-1)


def _from_pair(x: Tensor) -> Tensor:
    """`Q^T x` for `[S, 2, ...]`, where `Q = [[0, 1], [-1, 0]]` takes (row, col) to the original's pair."""
    return torch.stack([-x[:, 1], x[:, 0]], 1)


def _symmetric(gate: str, center: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and factor of the quadratic form that an unsymmetric inverse covariance stands for."""
    even = (inverse + inverse.mT) / 2
    factor, failed = torch.linalg.cholesky_ex(even)
    if failed.any():
        raise ValueError(f"{gate}attention_spreads must be positive definite to have a factor")
    return torch.linalg.solve(even, inverse @ center.unsqueeze(-1)).squeeze(-1), factor


def load_checkpoint(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> list[str]:
    """Load weights from a file into a model.

    Args:
        model: a `PosMLP`; it is left untouched if anything is wrong.
        path: `.safetensors`, or what torch can read with `weights_only=True`: a state dict of ours or the
            original's, also inside a training checkpoint (averaged weights win) or with DDP's prefix.
        strict: the file must hold the model's entries exactly. Otherwise what fits is loaded.

    Returns: what differs, a line each; empty with `strict`.
    Raises: `FileNotFoundError`; `ValueError` for a file that cannot be read, or that holds another model.
    """
    state, own = read_state(path), model.state_dict()
    found = differences(own, state)
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    if found and (strict or not fitting):
        raise another_model(path, found)
    model.load_state_dict(fitting, strict=False)
    return found


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file that `load_checkpoint` reads, in the names and layout of this package.

    Raises: `FileNotFoundError`; `ValueError` for a file that cannot be read or holds no state dict.
    """
    state = _unwrap(_read(Path(path)), path)
    if not is_original(state):
        return state
    try:
        return from_original(state)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} has the original's names but not its layout ({error!r})") from error


def differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """How a state dict differs from a model's own: shapes, then what is missing, then what is unexpected."""
    shapes = [
        f"{name} must be {list(own[name].shape)}, got {list(other[name].shape)}"
        for name in own
        if name in other and own[name].shape != other[name].shape
    ]
    # A count of batches, which only a BatchNorm without momentum reads; hand-made files leave it out.
    missing = [
        f"{name} is missing" for name in own if name not in other and not name.endswith("num_batches_tracked")
    ]
    return shapes + missing + [f"{name} is unexpected" for name in other if name not in own]


def another_model(path: str | os.PathLike, found: list[str]) -> ValueError:
    """The error for a file whose `differences` from a model are no option."""
    rest = len(found) - _SHOWN
    shown = found[:_SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
    return ValueError(f"{path} holds another model: " + "; ".join(shown))


def save_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model's state dict, as `.safetensors`, `.pt` or `.pth`; the file appears whole or not at all.

    Raises: `ValueError` for another ending, `ImportError` where safetensors is missing.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path must end in .safetensors, .pt or .pth, got {path.name!r}")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        # Not save_file, which lets nobody but the owner read the file.
        content = _safetensors().save(state, metadata={"format": "pt"})
        write_whole(path, lambda file: file.write(content))
    else:
        write_whole(path, lambda file: torch.save(state, file))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    reader = _safetensors().load_file if path.suffix == ".safetensors" else _torch_load
    try:
        return reader(path)
    except Exception as error:  # a corrupt file may break a reader anywhere
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint that can be read: {reason}") from error


def _torch_load(path: Path) -> Any:
    # Training scripts put their options beside the weights, as a Namespace: a plain holder of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install posmlp-kernels[models]") from error
    return safetensors.torch


def _unwrap(content: Any, path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without DDP's prefix."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict but a {type(content).__name__}")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(f"{path} holds no state dict: {', '.join(strangers[:_SHOWN])} are no tensors")
    return {name.removeprefix("module."): value for name, value in content.items()}
