"""`posmlp demo`: train on real digits, draw what was learned, and time the gate; a minute or two in all."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import visualize
from .card import ModelCard
from .data import Images, load_digits, optional, write_image
from .gate_speed import STAGE_3, Timing, time_gates
from .model import PosMLP
from .registry import create_model
from .training import History, Recipe, fit, predict_logits, steps_per_epoch
from .visualize import GateView, Predictions
from .weights import save_checkpoint

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MODEL = "posmlp_nano"
NEEDS = ("sklearn", "matplotlib", "PIL", "rich", "safetensors")


def run(out: str = "demo", epochs: int | None = None, seed: int = 0, threads: int = 1) -> float:
    """Run the demo and write weights, figures and sample images into the folder `out`.

    Args: as the command line's; `epochs=None` is the recipe's own number.
    Returns: the share of test images that are recognised.
    Raises: `ImportError` naming the extra to install, `OSError` where the folder cannot be written.
    """
    for name in NEEDS:
        optional(name)
    folder = Path(out)
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    console = optional("rich.console").Console(highlight=False)

    train, test = load_digits()
    recipe = Recipe(seed=seed) if epochs is None else Recipe(seed=seed, epochs=epochs)
    torch.manual_seed(seed)
    model = create_model(MODEL, in_chans=1, drop_path_rate=0.05)
    gate = model.levels[0].blocks[-1].gate
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{MODEL}, {parameters:,} parameters, on {len(train)} handwritten digits; {len(test)} others to test"
    )
    before, start = GateView.of(gate), time.perf_counter()
    with _threads(threads), _progress(console, train, recipe) as on_step:
        history = fit(model, train, test, recipe, on_step)
        probabilities = predict_logits(model, test.pixels, recipe).softmax(1)
    predictions = Predictions(test.pixels, test.labels, probabilities)
    wrong = round(len(test) * (1 - predictions.accuracy))
    console.print(
        f"[bold]test accuracy {predictions.accuracy:.2%}[/] ({wrong} of {len(test)} wrong), "
        f"{time.perf_counter() - start:.0f} s on {threads} thread{'s' if threads > 1 else ''}"
    )
    _write_weights(model, recipe, folder)
    _write_digits(test, predictions, folder / "digits")
    _draw(before, GateView.of(gate), history, predictions, folder)
    console.print(f"[bold]one gate of posmlp_tiny, stage 3[/]: {STAGE_3}", soft_wrap=True)
    console.print(_speed_table(time_gates()))
    console.print(
        f"weights, sample digits and figures are in {folder}{'' if out.endswith('/') else '/'}; try:"
    )
    weights, digits = shlex.quote(str(folder / "weights.safetensors")), shlex.quote(str(folder / "digits"))
    console.print(f"  posmlp predict {digits} --weights {weights}", soft_wrap=True)
    return predictions.accuracy


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The training's own number of threads: sums in another order would end in other weights."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@contextmanager
def _progress(console: Console, train: Images, recipe: Recipe) -> Iterator[Callable[[int, History], None]]:
    """A bar over the steps, with the epoch and the last accuracy; gives what `fit` calls after a step."""
    rich = optional("rich.progress")
    per_epoch = steps_per_epoch(train, recipe)
    columns = ("{task.description}", rich.BarColumn(), "{task.fields[state]}", rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=per_epoch * recipe.epochs, state="")

        def on_step(step: int, history: History) -> None:
            epoch = min(recipe.epochs, step // per_epoch + 1)
            accuracy = f"accuracy {history.test_accuracy[-1]:.1%}" if history.test_accuracy else ""
            progress.update(task, completed=step, state=f"epoch {epoch}/{recipe.epochs}  {accuracy}")

        yield on_step


def _write_weights(model: PosMLP, recipe: Recipe, folder: Path) -> None:
    path = folder / "weights.safetensors"
    save_checkpoint(model, path)
    card = ModelCard(
        MODEL,
        options={"in_chans": 1},
        classes=[str(digit) for digit in range(10)],
        in_chans=1,
        side=32,
        mean=(recipe.mean,),
        std=(recipe.std,),
        interpolation="bilinear",
    )
    card.save(path)


def _write_digits(test: Images, predictions: Predictions, folder: Path) -> None:
    """One test image of every class, and the hardest of all."""
    for index in predictions.typical():
        write_image(folder / f"{int(test.labels[index])}.png", test.pixels[index])
    for old in folder.glob("hardest_*.png"):  # of an earlier run
        old.unlink()
    index = predictions.hardest()[0]
    write_image(folder / f"hardest_{int(test.labels[index])}.png", test.pixels[index])


def _draw(
    before: GateView, after: GateView, history: History, predictions: Predictions, folder: Path
) -> None:
    visualize.draw_patterns(before, after, folder / "patterns.png")
    visualize.draw_bias(before, after, folder / "bias.png")
    visualize.draw_training(history, folder / "training.png")
    visualize.draw_predictions(predictions, folder / "predictions.png")
    visualize.draw_summary(before, after, history, predictions, folder / "summary.png")


def _speed_table(timings: list[Timing]) -> Table:
    """Milliseconds by back end, and how many times faster than the original style each is."""
    table = optional("rich.table").Table()
    table.add_column("back end")
    for column in ("forward, ms", "", "forward + backward, ms", ""):
        table.add_column(column, justify="right")
    original = timings[0]
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.forward:.1f}",
            f"{original.forward / timing.forward:.1f}x",
            f"{timing.both:.1f}",
            f"{original.both / timing.both:.1f}x",
        )
    table.caption = f"medians of one run on {torch.get_num_threads()} CPU threads; same results checked first"
    return table
