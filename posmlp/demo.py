"""`posmlp demo`: train on real digits, draw what was learned, and time the gate; a minute or two in all."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import visualize
from .data import Images, load_digits, normalise, optional, write_image
from .gate_speed import STAGE_3, Timing, time_gates
from .predict import classify, load_model
from .train.folder import RunFolder
from .train.recipe import RECIPES, Settings
from .train.run import NEEDS as TRAINING_NEEDS
from .train.run import train
from .visualize import GateView, History, Predictions
from .weights import save_checkpoint

if TYPE_CHECKING:
    from rich.table import Table

MODEL = "posmlp_nano"
NEEDS = ("sklearn", "matplotlib", *TRAINING_NEEDS)


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

    recipe = RECIPES["digits"].changed(seed=seed, **({} if epochs is None else {"epochs": epochs}))
    settings = Settings("digits", str(folder / "run"), MODEL, recipe, threads=threads)
    history = History.of(train(settings))
    # The averaged weights of the last epoch: the best epoch's would have been chosen by the test images.
    weights = RunFolder(settings.out).weights
    (model, card), (initial, _) = load_model(weights("ema")), load_model(weights("initial"))
    save_checkpoint(model, folder / "weights.safetensors")
    card.save(folder / "weights.safetensors")

    _, test = load_digits()
    probabilities = torch.cat([classify(model, normalise(part, card)) for part in test.pixels.split(256)])
    predictions = Predictions(test.pixels, test.labels, probabilities)
    console.print(
        f"[bold]test accuracy {predictions.accuracy:.2%}[/] "
        f"({int((predictions.predicted != test.labels).sum())} of {len(test)} wrong)"
    )
    _write_digits(test, predictions, folder / "digits")
    before, after = (GateView.of(m.levels[0].blocks[-1].gate) for m in (initial, model))
    _draw(before, after, history, predictions, folder)
    console.print(f"[bold]one gate of posmlp_tiny, stage 3[/]: {STAGE_3}", soft_wrap=True)
    console.print(_speed_table(time_gates()))
    console.print(
        f"weights, sample digits and figures are in {folder}{'' if out.endswith('/') else '/'}; try:"
    )
    weights, digits = shlex.quote(str(folder / "weights.safetensors")), shlex.quote(str(folder / "digits"))
    console.print(f"  posmlp predict {digits} --weights {weights}", soft_wrap=True)
    return predictions.accuracy


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
