"""How far off our gate is, beside plain PyTorch in the same dtype: as the tests measure it."""

from __future__ import annotations

from functools import cache, partial

import torch

from posmlp_kernels.testing import Case, make_inputs, run, run_eager, truth_of, with_gradients

from .gate_cases import Gate
from .gate_contenders import Settings

# Rounding alone stays below 2 on the mean over many draws; these are few, and a blunder is larger by far.
LIMIT, _DRAWS = 4.0, 2


@cache
def errors(case: Gate, name: str, settings: Settings) -> dict[str, float]:
    """For `z`, `dx`, `dtable`, ... the largest error of a back end's, as a multiple of eager PyTorch's.

    Both against float64 on the CPU, on two images; parameters are float32.
    """
    gate = partial(run, backend=None if name == "ours" else name)
    sums: dict[str, list[float]] = {}
    for seed in range(_DRAWS):
        small = as_test_case(case)
        inputs = make_inputs(small, settings.dtype, settings.device, seed, torch.float32)
        truth = truth_of(small, inputs)
        results = [with_gradients(function, small, inputs) for function in (gate, run_eager)]
        for key, wanted in truth.items():
            ours, eager = ((r[key].to("cpu", torch.float64) - wanted).abs().max().item() for r in results)
            unit = torch.finfo(results[0][key].dtype).eps * wanted.abs().max().item()
            total = sums.setdefault(key, [0.0, 0.0])
            total[0] += ours
            total[1] += max(eager, unit)
    return {key: ours / eager for key, (ours, eager) in sums.items()}


def as_test_case(case: Gate) -> Case:
    """The case with a batch of two, as the tests know it."""
    learned = case.encoding.startswith("lrpe")
    return Case(
        case.name,
        "measured",
        (case.map,) * case.rank,
        (case.window,) * case.rank,
        case.groups,
        case.channels,
        softmax=not learned,
        table="learned" if learned else "gqpe",
        matrix="shared" if case.encoding == "lrpe_m" else "none",
        shift=(case.shift,) * case.rank,
    )
