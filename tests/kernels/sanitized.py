"""Small, odd problems on the GPU, for compute-sanitizer to watch; their values are the other tests' matter.

    compute-sanitizer --tool memcheck python tests/kernels/sanitized.py [BACKEND ...]

Without names every back end that has a GPU here. Returns 1 if a result is not finite.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from support import available, device_of

from posmlp_kernels.testing import find_case, make_inputs, run, with_gradients

CASES = ("odd_channels", "partial_learned", "shift_partial", "volume", "matrix_grouped", "gelu_tanh_norm")
DTYPES = (torch.float32, torch.bfloat16)


def main(names: list[str]) -> int:
    for backend in names or [n for n in ("triton", "cuda") if available(n) and device_of(n) == "cuda"]:
        for case in map(find_case, CASES):
            for dtype in DTYPES if device_of(backend) == "cuda" else DTYPES[:1]:
                inputs = make_inputs(case, dtype, device_of(backend), parameter_dtype=torch.float32)
                results = with_gradients(partial(run, backend=backend), case, inputs)
                wrong = [name for name, value in results.items() if not value.isfinite().all()]
                print(
                    backend,
                    case.name,
                    dtype,
                    "not finite: " + ", ".join(wrong) if wrong else "ran",
                    flush=True,
                )
                if wrong:
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
