"""Requests to stop: SIGTERM, as schedulers send it, and SIGINT, the keyboard's."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Signals:
    """`with Signals() as signals:` notes the first request in `received`; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._handlers = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._handlers[number])
