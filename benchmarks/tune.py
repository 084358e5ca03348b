"""Times candidate tiles of the Triton gate on the GPU at hand and prints rows for the table of tiles.

    python -m benchmarks.tune [--dtype bfloat16] [--activation gelu] [--out FILE.json]
    python -m benchmarks.tune --dry-run                    what would be timed; needs no GPU

The shapes are those of PosMLP-T, -S and -B at 224 x 224 (`--models T` for one). A candidate's figure is its
geometric mean over the shapes, relative to the best candidate of each; the winners go by hand into the table
of posmlp_kernels/pos_gate/triton_tiles.py. Candidates that do not compile, do not fit or disagree with the
first are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from posmlp_kernels.pos_gate.triton_tiles import Tile

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A gate of PosMLP on square maps."""

    map: int
    window: int
    channels: int
    groups: int


def shapes(models: str) -> list[Shape]:
    """The four stages of some of the models T, S and B."""
    stages = ((56, 14, 2, 8), (28, 14, 4, 16), (14, 14, 8, 32), (7, 7, 8, 64))
    return [
        Shape(size, window, width * dim, groups)
        for dim in ({"T": 96, "S": 128, "B": 192}[model] for model in models)
        for size, window, width, groups in stages
    ]


def candidates(backward: bool) -> Iterator[Tile]:
    """Every tile worth a look: P kept or streamed, few large pieces or many small ones."""
    for piece, columns, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (1, 2, 3)):
        for keep, keys, waves in ((256, 32, 1), (0, 16, 4), (0, 32, 4)):
            for rows, run in ((32, 32), (64, 64)) if backward else ((64, 64),):
                yield Tile(256, piece, keys, columns, rows, run, warps, stages, keep, waves)


class Trial:
    """A gate's inputs, and its passes under a given tile."""

    def __init__(self, shape: Shape, dtype: torch.dtype, activation: str, batch: int) -> None:
        from posmlp_kernels import gqpe_table

        torch.manual_seed(0)
        size, window = (batch, shape.map, shape.map), (shape.window,) * 2
        x = torch.randn(*size, 2 * shape.channels, device="cuda", dtype=dtype)
        factor = torch.eye(2).expand(shape.groups, 2, 2) / 2
        table = gqpe_table(torch.zeros(shape.groups, 2), factor, window).cuda()
        bias = torch.randn(shape.window**2, device="cuda")
        settings = (window, (0, 0), True, ("none", "gelu", "gelu_tanh").index(activation), -1.0)
        self.inputs = (x, table, bias, None, None, None, *settings)
        self.dz = torch.randn(*size, shape.channels, device="cuda", dtype=dtype)

    def time(self, tile: Tile, backward: bool, truth: list[torch.Tensor]) -> float:
        """Milliseconds, or infinity; the first results become the truth."""
        import triton

        from posmlp_kernels.pos_gate import triton_launch

        def run() -> tuple[torch.Tensor, ...]:
            if backward:
                return triton_launch.backward(self.dz, *self.inputs, True)
            return (triton_launch.forward(*self.inputs),)

        def given(architecture: str, tokens: int, *rest: object) -> Tile:
            return tile.for_window(tokens)

        chosen, triton_launch.triton_tiles.tile_of = triton_launch.triton_tiles.tile_of, given
        try:
            results = run()
            truth += results if not truth else ()
            for actual, expected in zip(results, truth, strict=True):
                torch.testing.assert_close(
                    actual, expected, rtol=2e-2, atol=2e-2 * expected.abs().amax().item()
                )
            return triton.testing.do_bench(run)
        except (
            triton.compiler.CompilationError,
            triton.OutOfResources,
            RuntimeError,
            AssertionError,
        ) as error:
            print(f"left out: {tile}: {type(error).__name__}")
            return math.inf
        finally:
            triton_launch.triton_tiles.tile_of = chosen


def tune(models: str, backward: bool, dtype: torch.dtype, activation: str, batch: int) -> list[dict]:
    """Candidates, best first, with their mean slowness over the shapes."""
    tiles = list(candidates(backward))
    slowness = [0.0] * len(tiles)
    for shape in shapes(models):
        trial, truth = Trial(shape, dtype, activation, batch), []
        times = [trial.time(tile, backward, truth) for tile in tiles]
        best = min(times)
        slowness = [total + math.log(t / best) for total, t in zip(slowness, times, strict=True)]
    order = sorted(range(len(tiles)), key=slowness.__getitem__)
    count = len(shapes(models))
    return [{"tile": asdict(tiles[i]), "slowness": math.exp(slowness[i] / count)} for i in order]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="TSB", choices=("T", "S", "B", "TSB"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--activation", choices=("none", "gelu", "gelu_tanh"), default="none")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, help="write all candidates with their figures to this JSON file")
    parser.add_argument("--dry-run", action="store_true", help="list shapes and candidates, time nothing")
    options = parser.parse_args(arguments)
    if options.dry_run:
        for shape in shapes(options.models):
            print(shape)
        for backward in (False, True):
            print(f"{len(list(candidates(backward)))} tiles {'backward' if backward else 'forward'}")
        return
    rows = {}
    for backward in (False, True):
        name = "backward" if backward else "forward"
        rows[name] = tune(options.models, backward, DTYPES[options.dtype], options.activation, options.batch)
        for row in rows[name][:5]:
            print(f"{name}: {row['slowness']:.3f} x the best of each shape: {Tile(**row['tile'])}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
