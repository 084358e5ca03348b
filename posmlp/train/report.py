"""What a run shows: lines and a progress bar on the first process, and TensorBoard's events."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..data import optional


class Report:
    """Args:
    shown: whether this process prints anything.
    events: the folder for TensorBoard, None for none.
    update: where a resumed run goes on; TensorBoard forgets what came after.
    """

    def __init__(self, shown: bool = True, events: Path | None = None, update: int = 0) -> None:
        self.console = optional("rich.console", "train").Console(highlight=False, quiet=not shown)
        self._broken: set[str] = set()
        self._bar, self._task, self._events = None, None, None
        if events is not None:
            tensorboard = optional("torch.utils.tensorboard", "train")
            self._events = tensorboard.SummaryWriter(str(events), purge_step=update or None)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def progress(self, epochs: int, updates: int) -> Iterator[None]:
        """A bar over all updates, while the block runs."""
        rich = optional("rich.progress", "train")
        columns = ("{task.description}", rich.BarColumn(), "{task.fields[state]}", rich.TimeRemainingColumn())
        with rich.Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self._bar:
            self._epochs, self._updates = epochs, updates
            self._task = self._bar.add_task("training", total=epochs * updates, state="")
            try:
                yield
            finally:
                self._bar = None
                if self._events is not None:
                    self._events.close()

    def update(self, epoch: int, update: int, loss: float, speed: float) -> None:
        """Args: updates done in the epoch, mean loss so far in it, images a second of all processes."""
        state = f"epoch {epoch + 1}/{self._epochs}  loss {loss:.3f}  {speed:.0f} images/s"
        self._bar.update(self._task, completed=epoch * self._updates + update, state=state)

    def epoch(self, row: dict[str, float], update: int) -> None:
        """Print a row of the log, and send it to TensorBoard."""
        averaged = f", averaged weights {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
        self.say(
            f"epoch {row['epoch']}: loss {row['train_loss']:.3f}, validation {row['val_loss']:.3f}, "
            f"top-1 {row['val_top1']:.2f} %{averaged}, {row['images_per_second']:.0f} images/s"
        )
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(name.replace("_", "/", 1), value, update)
            self._events.flush()

    def broken(self, messages: Sequence[str]) -> None:
        """Name the images that cannot be read, each once, in whichever process has met them."""
        for message in dict.fromkeys(messages):
            if message in self._broken:
                continue
            self._broken.add(message)
            if self.console.quiet:
                print(f"skipped: {message}", file=sys.stderr)
            else:
                self.say(f"skipped: {message}")
