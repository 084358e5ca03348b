"""The command line: `posmlp demo`, `train`, `eval`, `predict`, `visualize`, `info`, `ablate`.

Torch is imported by the subcommands, not here, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .ablate.options import add_ablate
from .train.options import add_train

FAILED, INTERRUPTED = 2, 130
# What users can cause; anything else is a bug, and shows its traceback.
MISTAKES = (ValueError, OSError, ImportError, NotImplementedError, MemoryError, FloatingPointError)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"posmlp: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 after an error, which has one line on stderr."""
    arguments = vars(build_parser().parse_args(argv))
    run = arguments.pop("run")
    try:
        return run(**arguments)
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except MISTAKES as error:
        return fail(error)
    except KeyboardInterrupt:
        print("posmlp: interrupted", file=sys.stderr)
        return INTERRUPTED


def fail(error: Exception | str) -> int:
    """Say what went wrong in one line; returns the exit status."""
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"posmlp: error: {message}", file=sys.stderr)
    return FAILED


def build_parser() -> Parser:
    """The parser of all subcommands; each sets `run`, which takes the other arguments by name."""
    parser = Parser(
        prog="posmlp",
        description="PosMLP: vision models whose tokens are mixed by position alone.",
        epilog="Start with `posmlp demo`; `posmlp COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    add_train(commands)
    _add_eval(commands)
    _add_predict(commands)
    _add_info(commands)
    _add_visualize(commands)
    add_ablate(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small model on handwritten digits, draw what it learned, time the gate",
        description="Train posmlp_nano on scikit-learn's handwritten digits (about a minute), save its "
        "weights, draw what it learned, and time the gate by back end. The same seed and number of threads "
        "give the same result.",
    )
    demo.add_argument("--out", default="demo", metavar="FOLDER", help="where to write (default: %(default)s)")
    demo.add_argument("--epochs", type=_positive, metavar="N", help="passes over the digits (default: 20)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument(
        "--threads", type=_threads, default=1, metavar="N", help="of the training (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser(
        "predict",
        help="classify image files",
        description="Classify image files: a line for each, with its most probable classes. An image that "
        "cannot be read is reported on stderr, the others are classified, and the exit status is 2.",
    )
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files, and folders of them")
    _add_weights(predict)
    predict.add_argument("--topk", type=_positive, default=1, metavar="K", help="classes a line (default: 1)")
    predict.add_argument("--size", type=_side, metavar="N", help="side of the image that the model gets")
    _add_device(predict)
    predict.set_defaults(run=_predict)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="score a model on images whose classes are known",
        description="Score a model on the validation part of DATA, or on all of it where it has no parts: "
        "top-1, top-5, cross entropy, images a second. `posmlp train --help` says what DATA can be.",
    )
    evaluate.add_argument("data", metavar="DATA", help="images, as for posmlp train")
    _add_weights(evaluate)
    evaluate.add_argument(
        "--val-split", type=float, metavar="SHARE", help="of one folder, only what training held out"
    )
    evaluate.add_argument("--size", type=_side, metavar="N", help="side of the image that the model gets")
    evaluate.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="default: %(default)s"
    )
    evaluate.add_argument(
        "--workers", type=_natural, default=0, metavar="N", help="processes that load images"
    )
    evaluate.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s"
    )
    evaluate.add_argument("--per-class", action="store_true", help="a line for each class")
    evaluate.add_argument("--confusion", metavar="FILE", help="a picture of what is taken for what")
    _add_device(evaluate)
    evaluate.set_defaults(run=_eval)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="a checkpoint of ours or of the original's code"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the weights' model, e.g. posmlp_tiny (default: as the .json file beside the weights says)",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is)")


def _add_info(commands: argparse._SubParsersAction) -> None:
    info = commands.add_parser(
        "info",
        help="list the models, or describe one",
        description="Without a name: the models and their parameters. With one: parameters, "
        "multiply-accumulates and shapes by level, and which back end runs each level's gate here, and why.",
    )
    info.add_argument("name", nargs="?", metavar="NAME", help="a model, e.g. posmlp_tiny")
    info.add_argument("--size", type=_side, metavar="N", help="side of the image (default: the model's)")
    info.add_argument("--batch", type=_positive, default=1, metavar="N", help="images (default: %(default)s)")
    info.add_argument(
        "--windows", type=_positive, nargs="+", metavar="N", help="side of the windows: one, or one a level"
    )
    _add_device(info)
    info.set_defaults(run=_info)


def _add_visualize(commands: argparse._SubParsersAction) -> None:
    visualize = commands.add_parser(
        "visualize",
        help="draw what a model's gates have learned",
        description="Draw what the gates of a file of weights have learned: patterns of a query token, all "
        "groups of a level, bias maps, how far the gates reach, and for an image what they do to it. Writes "
        "a PNG each, and index.html, which holds all of them.",
    )
    _add_weights(visualize)
    visualize.add_argument("--before", metavar="FILE", help="other weights of the model, to compare with")
    visualize.add_argument(
        "--out", default="pictures", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    visualize.add_argument(
        "--levels", type=_natural, nargs="+", metavar="N", help="to show, counted from 0 (default: all)"
    )
    visualize.add_argument(
        "--groups", type=_positive, default=8, metavar="N", help="at most, of patterns (default: %(default)s)"
    )
    visualize.add_argument(
        "--query", type=_natural, nargs=2, metavar=("ROW", "COL"),
        help="the token of a window whose patterns are shown, counted from 0 (default: the middle)",
    )  # fmt: skip
    visualize.add_argument(
        "--image", nargs="+", default=(), metavar="FILE", help="images to show the gates' effect on"
    )
    _add_device(visualize)
    visualize.set_defaults(run=_visualize)


def _demo(**arguments: object) -> int:
    from .demo import run

    run(**arguments)
    return 0


def _eval(**arguments: object) -> int:
    from .evaluate import run

    return run(**arguments)


def _predict(**arguments: object) -> int:
    from .predict import run

    return run(**arguments)


def _info(**arguments: object) -> int:
    from .info import run

    run(**arguments)
    return 0


def _visualize(**arguments: object) -> int:
    from .visualize import run

    return run(**arguments)


def _positive(text: str) -> int:
    return _whole(text, 1, 2**31 - 1)


def _natural(text: str) -> int:
    return _whole(text, 0, 2**31 - 1)


def _side(text: str) -> int:
    return _whole(text, 1, 8192)


def _threads(text: str) -> int:
    return _whole(text, 1, 1024)


def _whole(text: str, least: int, most: int) -> int:
    value = int(text) if text.isdecimal() else -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} to {most}, got {text!r}")
    return value
