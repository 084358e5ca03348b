"""One thing after another, so that a failure, or the end of the time, costs that one alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Attempts:
    """Calls functions and keeps what went wrong.

    Args:
        deadline: by `time.monotonic`; nothing is started after it.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.failures: dict[str, str] = {}

    def __call__(self, name: str, function: Callable[..., T], *arguments: object) -> T | None:
        """The result, or None and the reason under `name` in `failures`."""
        if self.late():
            self.failures[name] = "left out: the time was up"
            return None
        try:
            return function(*arguments)
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {_first_line(error)}"
            return None

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
