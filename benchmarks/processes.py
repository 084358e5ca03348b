"""Steps of a long run as processes with time limits, none of which outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LEAST = 10.0  # seconds; with less left a step is not begun
_SHOWN = 15  # lines of what a failed step said


class Processes:
    """Runs commands from the repository's root, each with a log in `folder`.

    Args:
        deadline: by `time.monotonic`; what is then running is stopped.
    """

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline = folder, deadline
        self.records: list[dict] = []
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._stop_all())
            signal.signal(signal.SIGINT, lambda *_: self._stop_all())

    def run(
        self,
        name: str,
        command: Sequence[str],
        limit: float,
        environment: Mapping[str, str] | None = None,
        out: Path | None = None,
        late: bool = False,
    ) -> dict:
        """Run one to its end, or to its limit; a line says what became of it.

        Args:
            command: in which "{limit}" stands for the seconds it may plan with, "{out}" for `out`.
            limit: seconds.
            late: run it even after the deadline.

        Returns: `step`, `outcome` ("ok" or why not), `seconds` and the last line that it `said`; also added
            to `records`.
        """
        limit = limit if late else min(limit, self.deadline - time.monotonic())
        if limit < _LEAST:
            return self._told(
                {"step": name, "outcome": "left out: the time was up", "seconds": 0, "said": ""}
            )
        filled = {"{limit}": f"{0.8 * limit:.0f}", "{out}": str(out)}
        log = self.folder / f"{name.replace('/', ' of ')}.log"
        start = time.monotonic()
        with log.open("w") as sink:
            outcome = self._wait([filled.get(word, word) for word in command], environment, sink, limit)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        record = {"step": name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
        return self._told(record | {"said": lines[-1].strip()[:200] if lines else ""}, lines)

    def _wait(
        self, command: list[str], environment: Mapping[str, str] | None, sink: object, limit: float
    ) -> str:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        settings = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(environment or {})
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=settings,
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that it can be stopped together with what it starts
            )
        except OSError as error:
            return f"failed: {error}"
        with self._lock:
            self._running.add(process)
        try:
            code = process.wait(limit)
            return "ok" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            _stop(process)
            with self._lock:
                self._running.discard(process)

    def _told(self, record: dict, lines: Sequence[str] = ()) -> dict:
        failed = record["outcome"] != "ok"
        shown = [
            f"{record['seconds']:>7.1f} s  {record['step']:<34}{record['outcome']}  {record['said'][:80]}"
        ]
        shown += [f"            {line}" for line in lines[-_SHOWN:]] if failed else []
        with self._lock:
            self.records.append(record)
            print("\n".join(shown), flush=True)
        return record

    def _stop_all(self) -> None:
        for process in list(self._running):
            _stop(process)
        os._exit(130)  # threads that wait for the processes would keep sys.exit from returning


def _stop(process: subprocess.Popen) -> None:
    """Whatever is left of a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    if process.poll() is None:
        process.wait()


def interpreter(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)
