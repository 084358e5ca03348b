"""Random problems for the fuzzer: each is drawn whole from one number, so that the number replays it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from support import Layout

from posmlp_kernels.testing import Case, Inputs, make_inputs

# Both sides of every tile, vector and window width of the kernels and models, by the rank of the map.
SIZES = {
    1: (1, 2, 3, 4, 5, 7, 8, 9, 13, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 196),
    2: (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17),
    3: (1, 2, 3, 4, 5, 7),
}
GROUP_CHANNELS = (*range(1, 9), 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 95, 96, 97, 130)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_PRODUCTS = 4e6  # B * tokens * N * C: some ten milliseconds for a draw and its truth


@dataclass(frozen=True)
class Problem:
    """A case, and what a case leaves open."""

    number: int
    case: Case
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    scales: tuple[float, float]  # of x, and of the table and the matrix
    x: Layout
    dz: Layout

    def inputs(self, draw: int) -> Inputs:
        """The inputs of one draw, contiguous."""
        seed = random.Random(f"{self.number} {draw}").getrandbits(32)  # all the bits that torch looks at
        made = make_inputs(self.case, self.dtype, "cpu", seed, self.parameter_dtype)
        x_scale, mixing_scale = self.scales
        made["x"] *= x_scale
        for name in ("table", "matrix"):
            if made[name] is not None:
                made[name] *= mixing_scale
        return made


def draw_problem(number: int) -> Problem:
    """The problem of a number, the same everywhere."""
    pick = random.Random(number)
    case = _draw_case(pick)
    while case.batch * math.prod((*case.map, *case.window)) * case.channels > MOST_PRODUCTS:
        case = _draw_case(pick)
    dtype = pick.choice(DTYPES)
    half = dtype.itemsize == 2
    # float64 has no wider truth, so nothing there may depend on cancellation; float16 ends at 65504.
    exponent = 0 if dtype == torch.float64 else 1 if half else 6
    return Problem(
        number,
        case,
        dtype,
        pick.choice([dtype, torch.float32]) if half else dtype,
        (2.0 ** pick.randint(-exponent, exponent), 2.0 ** pick.randint(-exponent, min(exponent, 3))),
        _draw_layout(pick, len(case.map) + 2),
        _draw_layout(pick, len(case.map) + 2),
    )


def _draw_case(pick: random.Random) -> Case:
    rank = pick.choice([1, 2, 2, 3])
    window = tuple(pick.choice(SIZES[rank]) for _ in range(rank))
    # Half of the axes have whole windows, or almost.
    map_ = tuple(
        max(1, w * pick.randint(1, 3) + pick.randint(-1, 1))
        if pick.random() < 0.5
        else pick.choice(SIZES[rank])
        for w in window
    )
    groups = pick.choice([1, 1, 2, 3, 4, 8])
    matrix = pick.choice(["none", "none", "shared", "grouped"])
    tables = ["gqpe", "gqpe", "far", "learned"]
    if matrix == "grouped" or (matrix == "shared" and groups == 1):
        tables.append("none")
    channels = groups * pick.choice(GROUP_CHANNELS)
    return Case(
        "fuzz",
        "drawn at random",
        map_,
        window,
        groups,
        channels,
        batch=pick.choice([1, 1, 2, 3, 5]),
        softmax=(table := pick.choice(tables)) in ("gqpe", "far") or pick.random() < 0.5,
        table=table,
        matrix=matrix,
        bias=pick.random() < 0.7,
        shift=None if pick.random() < 0.4 else tuple(pick.randint(-w, 2 * w) for w in window),
        activation=pick.choice(["none", "none", "gelu", "gelu_tanh"]),
        # The normalised value of one to three channels hardly depends on them: gradients cancel to noise.
        norm=channels > 3 and pick.random() < 0.3,
    )


def _draw_layout(pick: random.Random, dimensions: int) -> Layout:
    order = list(range(dimensions))
    if pick.random() < 0.5:
        pick.shuffle(order)
    return Layout(tuple(order), pick.choice([0, 0, 1, 2]))
