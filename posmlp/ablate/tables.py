"""The tables of the ablations, as rows of models to train. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .scales import Base, Scale

# How many numbers one gate needs, with windows of N = h w tokens and S groups.
FORMULAS = {
    "SGU": "N^2",
    "LRPE-M": "N^2 + (2h-1)(2w-1)",
    "LRPE": "(2h-1)(2w-1)",
    "GLRPE": "S (2h-1)(2w-1)",
    "GGQPE": "6 S",
}
_ENDINGS = {"SGU": "_sgu", "LRPE-M": "_lrpe_m", "LRPE": "_lrpe", "GLRPE": "_glrpe"}
_CARRIED = {
    "SGU": "no; matrix resized",
    "LRPE-M": "no; matrix and table resized",
    "LRPE": "table resized",
    "GLRPE": "tables resized",
    "GGQPE": "as it is",
}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        cells: its first columns, by their headings.
        model: a registered name.
        options: further arguments of `create_model`.
        name: of model and changes, the same for all rows that stand for the same model.
    """

    cells: Mapping[str, str]
    model: str
    options: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class Table:
    """A comparison: its title, what a reader must know, and its rows at a scale."""

    title: str
    text: str
    rows: Callable[[Scale], Iterator[Row]]


def make_row(base: Base, cells: Mapping[str, str], kind: str = "GGQPE", **changes: Any) -> Row:
    """A base with a kind of encoding, a key of `FORMULAS`, and with changed options of `create_model`."""
    own = {**base.options, "windows": base.windows}
    if kind in ("GLRPE", "GGQPE"):  # the others have one group, by their name
        own["groups"] = base.groups
    changes = {key: value for key, value in changes.items() if own.get(key) != value}
    model = base.name + _ENDINGS.get(kind, base.ending)
    name = "-".join([model, *(f"{key}={_text(value, '_')}" for key, value in changes.items())])
    return Row(cells, model, own | changes, name)


def _encodings(scale: Scale) -> Iterator[Row]:
    for base in (scale.gmlp, scale.posmlp):
        for encoding, formula in FORMULAS.items():
            cells = {"model": base.family, "encoding": encoding, "numbers a gate": f"`{formula}`"}
            yield make_row(base, cells, encoding)


def _bias(scale: Scale) -> Iterator[Row]:
    for bias in (True, False):
        for embedding in (False, True):
            changes = ({} if bias else {"bias": False}) | ({"absolute_embedding": True} if embedding else {})
            cells = {"gate bias": _yes(bias), "absolute embedding": _yes(embedding)}
            yield make_row(scale.posmlp, cells, **changes)


def _groups(scale: Scale) -> Iterator[Row]:
    for groups in scale.groups:
        yield make_row(scale.posmlp, {"groups by level": _text(groups)}, groups=groups)


def _windows(scale: Scale) -> Iterator[Row]:
    for windows in scale.windows:
        yield make_row(scale.posmlp, {"windows by level": _text(windows)}, windows=windows)


def _covariance(scale: Scale) -> Iterator[Row]:
    isotropic, general = ("isotropic", "3 S", {"encoding": "gqpe_isotropic"}), ("general", "6 S", {})
    for base in (scale.gmlp, scale.posmlp):
        for covariance, numbers, changes in (isotropic, general):
            cells = {"model": base.family, "covariance": covariance, "numbers a gate": f"`{numbers}`"}
            yield make_row(base, cells, **changes)


def _transfer(scale: Scale) -> Iterator[Row]:
    for encoding, carried in _CARRIED.items():
        yield make_row(scale.posmlp, {"encoding": encoding, "fits other windows": carried}, encoding)


TABLES = {
    "encodings": Table(
        "Encodings",
        "N = h w are a window's tokens, S the groups. SGU, LRPE-M and LRPE have one group.",
        _encodings,
    ),
    "bias": Table("Gate bias and absolute position embedding", "PosMLP with GGQPE.", _bias),
    "groups": Table("Groups", "PosMLP with GGQPE.", _groups),
    "windows": Table("Window size", "PosMLP with GGQPE.", _windows),
    "covariance": Table(
        "Covariance", "GGQPE with one scale a group, or with a general covariance.", _covariance
    ),
    "transfer": Table(
        "Other windows and image sizes, without more training",
        "Top-1 of PosMLP's weights as trained (first column of figures), and at other sizes and windows. A "
        "quadratic encoding is kept, and counts tokens: of larger images it sees a smaller part. Tables are "
        "stretched with the window, and so are free matrices, where that was asked for.",
        _transfer,
    ),
}


def _text(value: Any, joint: str = " ") -> str:
    return joint.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
