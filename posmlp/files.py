"""Writing files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path`, which then takes its place: readers see the old or the new."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave the new name with no content
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
