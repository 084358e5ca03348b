"""Where images come from: `open_data` makes sense of what the command line calls DATA.

DATA is one of

- a folder with `train/` and `val/` (or `validation/`), each a folder per class, or `.tar` shards;
- a folder per class, or shards, which are split;
- shards by pattern: `shards/train-{000..146}.tar`, `shards/*.tar`. If their names tell training from
  validation, they are the two parts;
- `digits`, scikit-learn's handwritten digits (`./digits` is a folder of that name).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from .digits import Digits
from .folders import Folders, subfolders
from .shards import Shards, find_shards
from .split import stratified

if TYPE_CHECKING:
    from PIL.Image import Image

VAL_SPLIT = 0.1
_PARTS = ({"train"}, {"val", "validation"})


class Source(Protocol):
    """Images by number. Sources can be pickled, and forked: they hold no open files.

    `classes` has a name per class, `labels` the class of every image.
    """

    classes: Sequence[str]
    labels: Sequence[int]

    def name(self, index: int) -> str:
        """What to call an image in a message: a path, or `shard.tar:member.jpg`."""

    def open(self, index: int) -> Image:
        """An image in RGB, turned as its EXIF data say. Raises: `ValueError` naming an unreadable one."""


class Selection:
    """Some images of a source: those at `indices [m]`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.classes, self.labels = source.classes, np.asarray(source.labels)[indices]

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def open(self, index: int) -> Image:
        return self._source.open(self._indices[index])


def open_data(data: str, val_split: float | None = None, seed: int = 0) -> tuple[Source, Source]:
    """The images to train with, and those to validate with.

    Args:
        data: see above.
        val_split: share of every class that is held out, where DATA has no part for validation; 0.1 if None.
        seed: of this split.

    Raises: `ValueError` and `OSError`, in a line, for whatever is missing, empty, damaged or contradictory.
        Only whether each image can be read shows when it is opened.
    """
    if val_split is not None and not 0 < val_split < 1:
        raise ValueError(f"the share held out for validation must be between 0 and 1, got {val_split}")
    parts = _parts(data)
    if len(parts) == 1:
        return _split(parts[0](), VAL_SPLIT if val_split is None else val_split, seed, data)
    if val_split is not None:
        raise ValueError(f"{data} has its own part for validation, so it takes no split of {val_split}")
    train, val = (open_part() for open_part in parts)
    _check_same_classes(train, val, data)
    return train, val


def open_all(data: str) -> Source:
    """The images to evaluate with: the part for validation where DATA has one, else all of them.

    Raises: as `open_data`.
    """
    return _parts(data)[-1]()


def _parts(data: str) -> list[Callable[[], Source]]:
    """What opens all of DATA, or its two parts."""
    if data == "digits":
        return [partial(Digits, "train"), partial(Digits, "test")]
    if re.match(r"[A-Za-z][\w+.-]*://|pipe:", data):
        raise ValueError(f"DATA must be on this machine's file systems, got {data}")
    if not os.path.isdir(data):
        return _shard_parts(find_shards(data))
    folders = _part_folders(Path(data))
    if folders:
        return [partial(_open_folder, str(folder)) for folder in folders]
    shards = _shards_in(data)
    return _shard_parts(shards) if shards else [partial(_open_folder, data)]


def _part_folders(folder: Path) -> list[Path]:
    """The folders of the training and the validation part, or none.

    One alone, without folders or shards of its own, is a class that happens to be called `train`.
    """
    train, val = ([folder / name for name in subfolders(folder) if name in names] for names in _PARTS)
    if len(val) > 1:
        raise ValueError(f"{folder} has both {val[0].name}/ and {val[1].name}/")
    if train and val:
        return train + val
    for part in filter(_is_part, train + val):
        missing = "val" if train else "train"
        raise ValueError(f"{folder} has {part.name}/ but no {missing}/; to split it, give {part}")
    return []


def _is_part(folder: Path) -> bool:
    return bool(subfolders(folder)) or any(folder.glob("*.tar"))


def _shards_in(folder: str | Path) -> list[str]:
    shards = sorted(str(path) for path in Path(folder).glob("*.tar") if not path.name.startswith("."))
    if shards and subfolders(folder):
        raise ValueError(f"{folder} holds folders and shards; {folder}/*.tar names the shards alone")
    return shards


def _shard_parts(paths: list[str]) -> list[Callable[[], Source]]:
    """Shards, apart for training and validation if `train` and `val` are words of their names."""
    words = [set(re.split(r"[^a-z]+", Path(path).stem.lower())) for path in paths]
    parts = [[path for path, said in zip(paths, words, strict=True) if said & names] for names in _PARTS]
    if not all(parts):
        return [partial(_open_shards, paths)]
    for path in paths:
        if sum(path in part for part in parts) != 1:
            raise ValueError(f"{path} must be a shard of train or of val, as the others are")
    return [partial(_open_shards, part) for part in parts]


def _open_folder(folder: str) -> Source:
    shards = _shards_in(folder)
    return _open_shards(shards) if shards else _without_empty_classes(Folders(folder), folder)


def _open_shards(paths: list[str]) -> Source:
    return _without_empty_classes(Shards(paths), paths[0] if len(paths) == 1 else f"{paths[0]} and others")


def _without_empty_classes(source: Source, where: str) -> Source:
    counts = np.bincount(source.labels, minlength=len(source.classes))
    if not counts.any():
        raise ValueError(f"no images in {where}")
    empty = [source.classes[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise ValueError(f"no images of {_listed(empty)} in {where}")
    return source


def _check_same_classes(train: Source, val: Source, data: str) -> None:
    if tuple(train.classes) == tuple(val.classes):
        return
    differences = [
        f"{_listed(sorted(set(one) - set(other)))} only in the part for {name}"
        for one, other, name in (
            (train.classes, val.classes, "training"),
            (val.classes, train.classes, "validation"),
        )
        if set(one) - set(other)
    ]
    raise ValueError(f"{data}: {'; '.join(differences) or 'the two parts order their classes differently'}")


def _split(source: Source, share: float, seed: int, data: str) -> tuple[Source, Source]:
    single = [source.classes[label] for label in np.flatnonzero(np.bincount(source.labels) == 1)]
    if single:
        raise ValueError(f"{data}: a class needs two images to be split; {_listed(single)} has one")
    train, val = stratified(torch.as_tensor(source.labels), share, seed)
    return Selection(source, train.sort().values.numpy()), Selection(source, val.sort().values.numpy())


def _listed(names: Sequence[str], most: int = 5) -> str:
    """`class 'a'`, `classes 'a', 'b' and 7 more`."""
    shown = ", ".join(repr(name) for name in names[:most])
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"class{'es' if len(names) > 1 else ''} {shown}{rest}"
