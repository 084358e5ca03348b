"""What the structure of a Gaussian P saves: multiply-adds for each token and channel, three ways.

    python -m benchmarks.structure [--out FILE]

Dense takes N. Packed is what leaving out far weights comes to at best: for every tile of 7 queries, or its
first or last 3 where that is enough, the keys whose weights could show in a rounded result. Separable is a
pass over rows and one over columns for each term of the table's expansion into outer products, with as many
terms as the same accuracy needs. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from posmlp_kernels import PosSGU, mixing_matrix

WINDOWS = (7, 12, 14, 24, 32)
SCALES = (1.0, 0.7, 0.4)  # of the initial factors: the smaller, the wider the Gaussians
GROUPS, TILE, FEW = 8, 7, 3
NEGLIGIBLE = torch.finfo(torch.float32).eps / 2  # of a row's sum, all that is left out together


def kept(weights: Tensor) -> float:
    """The part of P `[S, N, N]` in which a tile of queries, or its ends, has a weight that counts.

    Of each row the smallest do not, as many as sum to `NEGLIGIBLE`.
    """
    tokens = weights.shape[-1]
    ordered, order = weights.sort(-1)
    counts = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(-1) > NEGLIGIBLE)
    tiles = torch.nn.functional.pad(counts, (0, 0, 0, -tokens % TILE)).unflatten(1, (-1, TILE))
    rows = torch.where(tiles[:, :, :-FEW].any(2) & tiles[:, :, FEW:].any(2), TILE, FEW) * tiles.any(2)
    return rows.sum().item() / weights.numel()


def multiplied(weights: Tensor, window: tuple[int, ...]) -> float:
    """The part of the multiply-adds of `P X1` under a softmax that is left at best: `kept`, and of an even
    number of rows of tokens, 8 or more, three products in the place of four (csrc/pos_gate/cpu_packing.h)."""
    rows = window[-2] if len(window) == 2 else 1
    return kept(weights) * (3 / 4 if rows >= 8 and rows % 2 == 0 else 1)


def terms(table: Tensor, window: int) -> int:
    """Outer products that the weights of one group's table `[2w-1, 2w-1]` need, by cross approximation.

    Until what is left of a whole row is negligible beside the smallest sum of a query.
    """
    rest = (table - table.max()).exp()
    smallest = rest.unfold(0, window, 1).unfold(1, window, 1).sum((-2, -1)).min()
    for count in range(len(table)):
        if rest.abs().max() * window**2 <= NEGLIGIBLE * smallest:
            return count
        row, column = divmod(int(rest.abs().argmax()), len(table))
        rest = rest - torch.outer(rest[:, column], rest[row]) / rest[row, column]
    return len(table)


def measure(window: int, scale: float) -> dict:
    torch.manual_seed(0)
    layer = PosSGU(2 * GROUPS, window, groups=GROUPS)
    with torch.no_grad():
        layer.factor *= scale
        table = layer.relative_table().double()  # float32, as the kernel gets it
    mean_terms = sum(terms(group, window) for group in table) / GROUPS
    return {
        "window": window,
        "scale": scale,
        "terms": mean_terms,
        "dense": window**2,
        "packed": round(kept(mixing_matrix(table, window, True)) * window**2),
        "separable": round(mean_terms * 2 * window),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    rows = [measure(window, scale) for scale in SCALES for window in WINDOWS]
    print("| window | factors | terms | dense | packed | separable |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = f"| {row['window']} | initial x {row['scale']:g} | {row['terms']:.1f} | {row['dense']} "
        print(cells + f"| {row['packed']} | {row['separable']} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
