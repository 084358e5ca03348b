"""Many names in little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np


class Names:
    """A sequence of strings in one block of bytes.

    A list of a million strings would be copied into every worker: counting references writes to each.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._bounds = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._bounds[index : index + 2]
        return os.fsdecode(self._text[start:end])
