"""Images in folders, one for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .images import IMAGE_ENDINGS, open_picture
from .names import Names

if TYPE_CHECKING:
    from PIL.Image import Image


class Folders:
    """A `Source` of the images below a folder's folders, whose names are the classes, in order.

    Hidden files and folders, and files that do not end like an image, are passed over. A class may have
    folders of its own; links to folders inside a class are not followed.
    Raises: `ValueError` where there are no class folders, `OSError` for a folder that cannot be read.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = str(root)
        self.classes = tuple(subfolders(root))
        if not self.classes:
            raise ValueError(f"{root} must hold a folder of images per class, or .tar shards; it has neither")
        paths, labels = [], []
        for label, name in enumerate(self.classes):
            found = sorted(_images_below(self._root, name))
            paths += found
            labels += [label] * len(found)
        self.labels = np.array(labels, np.int64)
        self._paths = Names(paths)

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def open(self, index: int) -> Image:
        path = self.name(index)
        return open_picture(path, path)


def subfolders(folder: str | Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images_below(root: str, name: str) -> Iterator[str]:
    """Paths of a class folder's images, from `root` on."""
    for folder, folders, files in os.walk(os.path.join(root, name), onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        for file in files:
            if file.lower().endswith(IMAGE_ENDINGS) and not file.startswith("."):
                yield os.path.join(below, file)


def _refuse(error: OSError) -> NoReturn:
    raise error
