"""WebDataset shards: tar files of images, each beside a `.cls` file with its class's number.

The members of every shard are listed once, at opening, and images are then read by position. So a shard is as
good as a folder: any order, any number of processes, any place to resume.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .images import IMAGE_ENDINGS, open_picture
from .names import Names

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_SHARDS = _MOST_CLASSES = 1_000_000


class Shards:
    """A `Source` of all samples of some shards, in order.

    The files of a sample share their name up to its first dot: one image, and `.cls`, a number as text.
    `classes.txt` beside the shards, or above their folder, has the classes' names, one a line.
    Raises: `ValueError` for a damaged shard, or a sample without an image or a class; `OSError`.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        names: list[str] = []
        labels, shards, offsets, sizes = (array("q") for _ in range(4))
        for shard, path in enumerate(paths):
            for image, label in _samples(path):
                names.append(image.name)
                labels.append(label)
                shards.append(shard)
                offsets.append(image.offset)
                sizes.append(image.size)
        self.labels, self._shards, self._offsets, self._sizes = (
            np.array(values, np.int64) for values in (labels, shards, offsets, sizes)
        )
        self._names = Names(names)
        self.classes = _class_names(Path(paths[0]), self.labels)

    def name(self, index: int) -> str:
        return f"{self._paths[self._shards[index]]}:{self._names[index]}"

    def open(self, index: int) -> Image:
        name, size = self.name(index), int(self._sizes[index])
        try:
            with open(self._paths[self._shards[index]], "rb") as shard:
                shard.seek(int(self._offsets[index]))
                content = shard.read(size)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        return open_picture(io.BytesIO(content), name)


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def _samples(path: str) -> Iterator[tuple[_Member, int]]:
    """The image and the class's number of every sample of a shard, by name."""
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    keys: dict[str, None] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                folder, base = os.path.split(member.name)
                if not member.isreg() or base.startswith("."):
                    continue
                stem, _, ending = base.partition(".")
                key = os.path.join(folder, stem)
                keys[key] = None
                if ending == "cls":
                    labels[key] = _label(shard.extractfile(member).read(100), f"{path}:{member.name}")
                elif f".{ending.lower()}" in IMAGE_ENDINGS:
                    if key in images:
                        raise ValueError(f"{path}: sample {key!r} has two images, or comes twice")
                    images[key] = _Member(member.name, member.offset_data, member.size)
            _check_end(file, shard.offset, path)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is a damaged or truncated tar file: {error}") from error
    for key in keys:
        if key not in images or key not in labels:
            raise ValueError(f"{path}: sample {key!r} has no {'.cls' if key in images else 'image'} file")
        yield images[key], labels[key]


def _check_end(file: io.BufferedReader, offset: int, path: str) -> None:
    """What follows the last member must be zeros; tarfile also stops, silently, where a header is damaged."""
    file.seek(offset)
    rest = file.read(4 * tarfile.RECORDSIZE)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise ValueError(f"{path} is a damaged or truncated tar file: no end after its last member")


def _label(content: bytes, name: str) -> int:
    text = content.decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} must be the number of a class, got {text[:30]!r}")
    return int(text)


def _class_names(shard: Path, labels: np.ndarray) -> tuple[str, ...]:
    """A name per class: the lines of `classes.txt`, or numbers."""
    count = int(labels.max(initial=-1)) + 1
    for path in (shard.parent / "classes.txt", shard.parent.parent / "classes.txt"):
        if path.is_file():
            names = _lines(path)
            if count > len(names):
                raise ValueError(f"{path} has {len(names)} classes, but images have class {count - 1}")
            return names
    if count > _MOST_CLASSES:
        raise ValueError(
            f"{shard} and others have class {count - 1}; expected at most {_MOST_CLASSES} classes"
        )
    return tuple(str(label) for label in range(count))


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8") from error
    return tuple(line.strip() for line in lines if line.strip())


def find_shards(pattern: str) -> list[str]:
    """The files of a path, or of a pattern such as `train-{000..146}.tar` or `*.tar`, in order.

    Raises: `FileNotFoundError` for a missing shard, `ValueError` for a file that is no `.tar`.
    """
    found: set[str] = set()  # a pattern may name a file twice
    for path in [pattern] if os.path.exists(pattern) else _expand_braces(pattern):
        matches = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        if not matches or not all(map(os.path.isfile, matches)):
            raise FileNotFoundError(f"no folder or shard at {path}")
        found.update(matches)
    strangers = [path for path in sorted(found) if not path.endswith(".tar")]
    if strangers:
        raise ValueError(f"expected a folder or .tar shards, got the file {strangers[0]}")
    return sorted(found)


def _expand_braces(pattern: str) -> list[str]:
    """`a{1..3}` is a1 a2 a3, with as many digits as the first number; `{a,b}` is a b."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", braces[1])
    if span is None:
        choices = braces[1].split(",")
    else:
        first, last = map(int, span.groups())
        if not 0 <= last - first < _MOST_SHARDS:
            raise ValueError(f"{braces[0]} must count up, to at most {_MOST_SHARDS} shards")
        choices = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [path for choice in choices for path in _expand_braces(head + choice + tail)]
