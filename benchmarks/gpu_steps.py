"""The steps of `gpu.py` as data: what is run, with which limits. Nothing of torch is imported here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .processes import interpreter

PARTS = ("build", "test", "sanitize", "gate", "models")
OURS = ("posmlp_tiny", "posmlp_small", "posmlp_base")
THEIRS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "gmlp_s16_224")
_STAGES = ("stage 1", "stage 2", "stage 3", "stage 4")
_UNMEASURED = ("--seconds", "0", "--rounds", "1")
_KNOWN_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


@dataclass(frozen=True)
class Options:
    """Where, how thoroughly, which back ends, and whether timm's models are there to compare with."""

    device: str
    quick: bool
    backends: tuple[str, ...]
    timm: bool


@dataclass(frozen=True)
class Step:
    """A command with its limit in seconds.

    Args:
        kept: whether what it writes to "{out}" belongs to the results.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    kept: bool = False


def build() -> Step:
    """Compile the extensions in place; without a compiler this succeeds and says so."""
    here = {"TORCH_CUDA_ARCH_LIST": "native"}  # all architectures would take minutes
    return Step("build", interpreter("setup.py", "build_ext", "--inplace"), 240, here)


def preparations(parts: Sequence[str], options: Options, cores: int) -> list[Step]:
    """What is not timed, all of it at once."""
    steps = []
    if "test" in parts:
        steps += tests(options, max(1, min(8, cores // 2)))
    if "sanitize" in parts:
        steps += sanitizers(options)
    if not options.quick:
        threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // 4))}
        steps = rehearsals(parts, options, threads) + steps  # the longest first
    return steps


def tests(options: Options, shards: int) -> list[Step]:
    """`pytest -m gpu`, dealt out to several processes; a rehearsal runs the GPU's own tests, which skip."""
    what = ("tests/kernels/test_gpu.py",) if options.device == "cpu" else ("tests", "-m", "gpu")
    command = interpreter("-m", "pytest", *what, "-rfE", "--tb=short", "-p", "no:cacheprovider")
    shards = 1 if options.device == "cpu" else shards
    return [
        Step(f"test {i + 1}/{shards}", (*command, "--shard", f"{i}/{shards}"), 300, {"OMP_NUM_THREADS": "1"})
        for i in range(shards)
    ]


def sanitizers(options: Options) -> list[Step]:
    """Out-of-bounds accesses and races on small, odd shapes, where the program exists."""
    places = [shutil.which("compute-sanitizer"), *(f"{p}/compute-sanitizer" for p in _KNOWN_PLACES)]
    program = next((place for place in places if place and Path(place).exists()), None)
    if program is None or options.device != "cuda":
        print("compute-sanitizer: not here, or nothing for it to watch; left out")
        return []
    script = interpreter("tests/kernels/sanitized.py", *options.backends)
    watched = ("--target-processes", "application-only", "--error-exitcode", "9")
    # torch's allocator would hide an access beyond a tensor but inside a block of its cache.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    return [
        Step(f"sanitize {tool}", (program, "--tool", tool, *watched, *script), 240, alone)
        for tool in ("memcheck", "racecheck")
    ]


def rehearsals(parts: Sequence[str], options: Options, environment: dict[str, str]) -> list[Step]:
    """What is going to be timed, once and untimed: it fills the caches of Triton and of torch.compile."""
    steps = models(options, apart=True)[::-1] if "models" in parts else []  # training takes longest
    steps += gates(options) if "gate" in parts else []
    return [
        replace(
            step,
            name=f"compile for {step.name}",
            command=step.command + _UNMEASURED,
            limit=240,
            environment=environment,
            kept=False,
        )
        for step in steps
        if "--no-compile" not in step.command
    ]


def measurements(parts: Sequence[str], options: Options) -> list[Step]:
    """What is timed, one at a time: what matters most first."""
    stages, *others = gates(options) if "gate" in parts else [None]
    steps = [] if stages is None else [stages, launch(options)]
    return steps + (models(options) if "models" in parts else []) + others


def gates(options: Options) -> list[Step]:
    """Stages and variants in bfloat16, and the stages in the other precisions."""

    def gate(name: str, limit: float, *arguments: str) -> Step:
        command = ("-m", "benchmarks.bench_pos_gate", "--device", options.device, *arguments)
        ends = ("--backends", *options.backends, "--limit", "{limit}", "--out", "{out}")
        return Step(f"gate {name}", interpreter(*command, *ends), limit, kept=True)

    if options.quick:
        small = ("--no-compile", "--batch", "2", *_UNMEASURED)
        return [
            gate("stages", 120, "--dtype", "bfloat16", "--suite", "gpu stages", "--case", "stage 4", *small),
            gate("variants", 120, "--suite", "gpu variants", "--case", "LRPE, stage 3", *small),
        ]
    short = ("--seconds", "0.1", "--rounds", "3")
    others = (*short, "--suite", "gpu stages", "--case", *_STAGES, "--no-compile")
    return [
        gate("stages", 180, "--dtype", "bfloat16", "--suite", "gpu stages", *short),
        gate("variants", 90, "--dtype", "bfloat16", "--suite", "gpu variants", "--no-compile", *short),
        *(gate(precision, 45, "--dtype", precision, *others) for precision in ("float32", "tf32", "float16")),
    ]


def launch(options: Options) -> Step:
    dtype = ("--dtype", "bfloat16", "--device", options.device)
    command = ("-m", "benchmarks.bench_launch", *dtype, "--backends", *options.backends, "--out", "{out}")
    return Step("launch", interpreter(*command), 60, kept=True)


def models(options: Options, apart: bool = False) -> list[Step]:
    """Inference and training of all models together, or with `apart` a step for each model."""
    names = OURS[:1] if options.quick else (*OURS, *(THEIRS if options.timm else ()))
    batches = ("2", "2") if options.quick else ("256", "128")
    effort = ("--no-compile", *_UNMEASURED) if options.quick else ("--seconds", "0.5")
    backend = ("--backend", options.backends[0]) if options.backends else ()
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    steps = []
    for what, limit, batch in (
        ("inference", 120, ("--batch", batches[0], "--train-batch")),
        ("training", 180, ("--batch", "--train-batch", batches[1])),
    ):
        for chosen in [(name,) for name in names] if apart else [names]:
            command = ("-m", "benchmarks.bench_models", "--device", options.device, "--dtype", dtype)
            rest = ("--models", *chosen, *effort, "--limit", "{limit}", "--out", "{out}")
            title = f"models {what}" + (f" {chosen[0]}" if apart else "")
            steps.append(Step(title, interpreter(*command, *backend, *batch, *rest), limit, kept=True))
    return steps
