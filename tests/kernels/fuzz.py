"""Random problems against the reference in float64, on every instruction set, for as long as one likes.

    python tests/kernels/fuzz.py [--seconds S] [--seed N] [--problems COUNT] [--kernels NAME]

Problems are drawn from the numbers N, N + 1, ... alone, and a failure prints the command that runs it again.
Errors are measured against those of plain PyTorch in the same dtype; 1 and 2 threads must give the same bits.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
from fuzz_problems import Problem, draw_problem
from support import instruction_sets

from posmlp_kernels.testing import (
    Inputs,
    poisoned_memory,
    run,
    run_eager,
    truth_of,
    with_gradients,
)

RUNNING, FAILED = "#running", "#failed"  # what a sweep tells the process that started it
Results = dict[str, torch.Tensor]
MOST_FAILURES = 5
# Rounding differs by small factors, and thousands of problems find the largest; a blunder is larger by far. A
# suspicion is confirmed by the mean over more draws.
FACTOR, DRAWS = 4.0, 12
FLOAT64_TOLERANCE = 1e-11  # of the largest entry: far above rounding, far below a detour through float32


def check(problem: Problem) -> None:
    """Raises AssertionError if values, gradients or bits are wrong."""
    draw = problem.inputs(0)
    again = compute(problem, draw, threads=2)
    actual = compute(problem, draw, threads=1)  # and eager after it, which has no use for two
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name}: other bits, or NaN, with 2 threads"
    if problem.dtype == torch.float64:
        for name, truth in truth_of(problem.case, draw).items():
            scale = max(1.0, truth.abs().max().item())
            error = (actual[name] - truth).abs().max().item()
            assert error <= FLOAT64_TOLERANCE * scale, f"{name}: error {error:.3e} at {scale:.3e}"
        return
    try:
        compare([actual], problem, [draw])
    except AssertionError:
        draws = [problem.inputs(k) for k in range(DRAWS)]
        compare([compute(problem, d, threads=1) for d in draws], problem, draws)


def compute(problem: Problem, inputs: Inputs, threads: int) -> Results:
    """What the compiled back end makes of the inputs in the problem's layouts."""
    torch.set_num_threads(threads)
    views = {"x": problem.x(inputs["x"]), "dz": problem.dz(inputs["dz"])}
    with poisoned_memory():
        return with_gradients(partial(run, backend="cpu"), problem.case, inputs | views)


def compare(actual: list[Results], problem: Problem, draws: list[Inputs]) -> None:
    """Hold the largest error, on average over the draws, to FACTOR times eager's."""
    eager = [with_gradients(run_eager, problem.case, inputs) for inputs in draws]
    truth = [truth_of(problem.case, inputs) for inputs in draws]
    for name in truth[0]:
        errors, allowed = [], []
        for ours, theirs, true in zip(actual, eager, truth, strict=True):
            eps = torch.finfo(ours[name].dtype).eps
            size = max(largest(true[name]), size_of_terms(problem, name))
            errors.append(largest(ours[name] - true[name]))
            allowed.append(FACTOR * max(largest(theirs[name] - true[name]), eps * size))
        error, most = sum(errors) / len(errors), sum(allowed) / len(allowed)
        assert error <= most, f"{name}: error {error:.3e} is {FACTOR * error / most:.1f} x eager's"


def largest(t: torch.Tensor) -> float:
    return t.abs().max().item()


def size_of_terms(problem: Problem, name: str) -> float:
    """What cancels in a sum whose result may be nothing at all: gradients of a softmax's row sum to zero."""
    if not (problem.case.softmax and name in ("dtable", "dmatrix")):
        return 0.0
    case = problem.case
    count = case.batch * math.prod(case.map) * case.channels / case.groups
    return count**0.5 * problem.scales[0] ** 2


def sweep(seed: int, seconds: float, problems: int) -> Iterator[str]:
    """Run problems until the time or their count ends; yields each number, and a report per failure."""
    end, failures, count = time.monotonic() + seconds, 0, 0
    while count < problems and time.monotonic() < end and failures < MOST_FAILURES:
        number = seed + count
        count += 1
        yield f"{RUNNING} {number}"
        problem = draw_problem(number)
        try:
            check(problem)
        except Exception as error:
            failures += 1
            yield f"{type(error).__name__}: {error}\n  {problem}"
            yield f"{FAILED} {number}"
    yield f"{count} problems from {seed}, {failures} failed"


def run_kernels(kernels: str, seed: int, seconds: float, problems: int) -> bool:
    """A sweep in a process of its own: the library chooses its kernels once, and may crash. Is all well?"""
    command = [sys.executable, "-u", __file__, "--seed", str(seed), "--seconds", str(seconds)]
    command += ["--problems", str(problems), "--kernels", kernels, "--here"]
    environment = os.environ | {"POSMLP_CPU_KERNELS": kernels}
    number, failed = seed, []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == RUNNING:
                number = int(rest)
            elif word == FAILED:
                failed.append(number)
            else:
                print(f"{kernels}: {line}", end="", flush=True)
    if child.returncode and not failed:
        print(f"{kernels}: ended with status {child.returncode}")
        failed.append(number)
    for number in failed:
        print(f"again: python {sys.argv[0]} --kernels {kernels} --problems 1 --seed {number}", flush=True)
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="for all instruction sets together")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9), help="the first problem")
    parser.add_argument("--problems", type=int, default=10**9, help="at most so many per instruction set")
    parser.add_argument("--kernels", help="one instruction set rather than all of this processor")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this very process
    options = parser.parse_args()
    if options.here:
        for line in sweep(options.seed, options.seconds, options.problems):
            print(line)
        return
    chosen = [options.kernels] if options.kernels else instruction_sets()
    print(f"seed {options.seed}, {options.seconds:g} s, on {', '.join(chosen)}", flush=True)
    share = options.seconds / len(chosen)
    right = [run_kernels(name, options.seed, share, options.problems) for name in chosen]
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
