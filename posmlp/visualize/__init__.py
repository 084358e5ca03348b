"""Figures: what gates hold, how far they reach, what they do to an image, and the demo's story.

`run` is `posmlp visualize`. The data behind a figure is in `views`, `extent` and `effect`, which do not need
matplotlib; the drawing is in `gates`, `charts` and `demo`, on what `style` and `panels` provide.
"""

from .command import run
from .demo import draw_bias, draw_patterns, draw_predictions, draw_summary, draw_training
from .style import BLUE, INK, MUTED, ORANGE
from .views import GateView, History, LevelView, Predictions, view_levels

__all__ = [
    "BLUE",
    "INK",
    "MUTED",
    "ORANGE",
    "GateView",
    "History",
    "LevelView",
    "Predictions",
    "draw_bias",
    "draw_patterns",
    "draw_predictions",
    "draw_summary",
    "draw_training",
    "run",
    "view_levels",
]
