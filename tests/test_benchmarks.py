"""The benchmarks run, write what the documents are made from, and the documents say what they wrote.

Sizes are tiny and nothing is said about times.
"""

import json
import re
import time
from functools import partial

import pytest
import torch

pytest.importorskip("timm", reason="the benchmarks measure timm's models")
pytest.importorskip("matplotlib", reason="the benchmarks draw figures")

from benchmarks import bench_models, bench_pos_gate, report, targets, timing
from benchmarks.attempts import Attempts
from benchmarks.gate_cases import BACKWARD, BOTH, DIRECTIONS, FORWARD, SUITES, SWEEPS, Gate, flops_around
from benchmarks.gate_contenders import Contender, Settings, Truth, contender, names
from benchmarks.plots import draw
from posmlp_kernels import PosSGU

CPU = torch.device("cpu")
SETTINGS = Settings(CPU)
TIME = {"median", "spread", "runs"}
MACHINE = {"processor", "instructions", "cores", "threads", "torch", "python", "commit", "date"}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(timing.Ceilings.__init__, "__defaults__", (64,))


# ---- the gate ----


def test_gate_benchmark_writes_everything(tmp_path, capsys):
    """The whole program on its smallest case, compiled contender and memory included."""
    out = tmp_path / "new" / "gate.json"
    small = ["--batch", "1", "--seconds", "0", "--rounds", "1", "--no-sweeps"]
    bench_pos_gate.main(["--case", "stage 4", "--out", str(out), *small])
    results = json.loads(out.read_text())
    assert set(results["machine"]) == MACHINE
    assert set(results["ceilings"]) >= {"gemm", "copy"}
    forward, both = results["rows"]
    assert (forward["direction"], both["direction"]) == ("forward", "forward + backward")
    timed = {"ours", "ours, gelu", "gelu alone", "plain", "original", "original, compiled", "bytes copied"}
    assert set(forward["times"]) == timed | {"plain, P given"}
    assert set(both["times"]) == timed
    for row in results["rows"]:
        assert all(set(time) == TIME and time["median"] > 0 for time in row["times"].values())
        assert set(row["errors"]) == {"ours"} and not row["failures"]
        assert 0 < max(row["errors"]["ours"].values()) < 4
    assert both["flops"] == 4 * forward["flops"] == 8 * 49 * 49 * 768
    assert forward["bytes"] == 3 * 49 * 768 * 4
    assert set(both["memory"]) == {"ours", "plain", "original"}
    assert "stage 4, forward: times the time to copy its bytes" in capsys.readouterr().out


def test_unknown_cases_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_pos_gate.main(["--case", "stage 5"])
    assert "got ['stage 5']" in capsys.readouterr().err


def test_sweeps():
    points = {side: Gate("tiny", side, 2, 4, 2, 1, against=("plain", "original")) for side in (2, 4)}
    effort, ceilings = bench_pos_gate.Effort(0, 1, False), timing.Ceilings(CPU, torch.float32)
    rows = bench_pos_gate.sweep(points, SETTINGS, effort, ceilings)
    assert [row["size"] for row in rows] == [2, 4]
    assert all(set(row["times"]) == {"ours", "plain", "original"} for row in rows)


@pytest.mark.parametrize("encoding", ["gqpe", "lrpe", "lrpe_m"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contenders_agree(encoding, precision, direction):
    against = ("ours, gelu", "plain", "original") if encoding == "gqpe" else ("ours, gelu", "plain")
    case = Gate(
        "tiny", 8, 4, 12, 1 if encoding == "lrpe_m" else 3, 2, encoding, trained=True, against=against
    )
    settings = Settings(CPU, precision)
    truth = Truth(case, direction, settings)
    for name in ("ours", *against):
        truth.check(name, contender(case, name, settings))


def test_a_wrong_contender_is_found():
    case = Gate("tiny", 4, 2, 4, 2, 1)
    ours = contender(case, "ours", SETTINGS)
    wrong = Contender(lambda x: ours.function(x) * 1.001, ours.x, ours.dz)
    for direction in DIRECTIONS:
        with pytest.raises(RuntimeError, match="plain differs from the reference on tiny"):
            Truth(case, direction, SETTINGS).check("plain", wrong)


def test_cases_are_distinct_and_fit():
    cases = [case for suite in SUITES.values() for case in suite]
    assert all(len({case.name for case in suite}) == len(suite) for suite in SUITES.values())
    for case in (*cases, *(gate for points in SWEEPS.values() for gate in points.values())):
        case.layer()  # raises for sizes that do not fit
        assert case.tiled or "original" not in case.against
        assert case.rank == 2 or "plain" not in names(case, FORWARD, SETTINGS, compiled=True)


def test_flops_count_the_pairs_of_tokens_that_share_a_window():
    window, side, shift = 3, 7, 2
    place = (torch.arange(side) + shift) // window
    window_of = torch.cartesian_prod(place, place)  # [tokens, 2]
    pairs = (window_of.unsqueeze(0) == window_of.unsqueeze(1)).all(-1).sum().item()
    case = Gate("partial", side, window, 5, 1, 2, shift=shift)
    assert case.flops(FORWARD) == 2 * 2 * pairs * 5
    assert Gate("whole", 6, 3, 5, 1, 2).flops(FORWARD) == 2 * 2 * 36 * 9 * 5


# ---- models ----


def test_model_benchmark():
    """Inference and training of a small model, eager and compiled."""
    for training in (False, True):
        setting = bench_models.Setting(training, 2, 32, CPU, torch.float32)
        row = bench_models.measure(["posmlp_nano"], ["posmlp_nano"], setting, 0, 1)
        assert row["what"] == ("training step" if training else "inference")
        assert set(row["times"]) == {"posmlp_nano", "posmlp_nano, compiled"}
        assert ("memory" in row) == training
        assert len(bench_models.lines(row)) == 3


def test_the_original_and_ours_compute_the_same():
    setting = bench_models.Setting(False, 1, 224, CPU, torch.float32)
    names = (targets.OURS, targets.ORIGINAL)
    works = {name: bench_models.work_of(name, setting) for name in names}
    assert bench_models.check(works, torch.float32, Attempts()) == list(names)
    works[targets.ORIGINAL] = lambda: works[targets.OURS]() * 1.01
    attempts = Attempts()
    assert bench_models.check(works, torch.float32, attempts) == [targets.OURS]
    assert "original PosMLP-T computes something else" in attempts.failures[targets.ORIGINAL]


def test_a_training_step_trains():
    step = bench_models.work_of("posmlp_nano", bench_models.Setting(True, 4, 32, CPU, torch.float32))
    losses = [step().item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_model_program(tmp_path):
    out, models = tmp_path / "models.json", ["--models", targets.OURS]
    small = ["--batch", "1", "--train-batch", "--seconds", "0", "--rounds", "1", "--no-compile"]
    bench_models.main([*models, *small, "--out", str(out)])
    results = json.loads(out.read_text())
    assert set(results) == {"machine", "timm", "device", "dtype", "backend", "size", "ceilings", "rows"}
    assert set(results["machine"]) == MACHINE
    assert [set(row["times"]) for row in results["rows"]] == [{targets.OURS}]


# ---- measuring ----


def test_contenders_take_turns():
    calls = []

    def work(name):
        calls.append(name)
        time.sleep(0.005)

    times = timing.race({name: partial(work, name) for name in "ab"}, 0, 3)
    assert re.sub(r"(.)\1*", r"\1", "".join(calls)) == "ab" * 4  # a round that does not count, and three
    assert times["a"].runs < calls.count("a")


def test_time_of_runs():
    assert timing.Time.of([3.0]) == timing.Time(3.0, 0.0, 1)
    assert timing.Time.of([1.0, 2.0, 3.0]).median == 2.0


def _holding(megabytes):
    kept = torch.ones(megabytes * 2**18)
    return lambda: kept + 1


@pytest.mark.skipif(not timing.Path("/proc/self/status").exists(), reason="only Linux tells")
def test_peak_memory():
    mark = timing.peak_memory(_holding, 100)
    assert 200 <= mark / 2**20 < 260  # what is kept and one result


# ---- targets and documents ----

CPU_RUN = {"device": "cpu", "dtype": "float32"}


def test_targets_of_a_gate():
    times = {"ours": 0.01, "ours, gelu": 0.011, "gelu alone": 0.02, "original": 0.05, "bytes copied": 0.002}
    row = {
        "case": "stage 2",
        "direction": "forward",
        "flops": 1.6e9,
        "bytes": 1,
        "times": {name: {"median": time} for name, time in times.items()},
        "ceilings": {"gemm": 2e11, "onednn": 4e11, "copy": 1e10},
    }
    share, faster, gelu = targets.gate_targets(CPU_RUN | {"rows": [row]})
    assert (share.value, share.verdict) == (pytest.approx(0.8), "yes")
    assert (faster.value, faster.verdict) == (pytest.approx(5), "no")
    assert (gelu.value, gelu.verdict) == (pytest.approx(10), "yes")
    assert "eager GELU alone: 200 %" in gelu.what
    times |= {"ours, gelu": 0.012}
    for alone, verdict in ((0.02, "no"), (0.009, "not asked")):
        row["times"] = {name: {"median": time} for name, time in (times | {"gelu alone": alone}).items()}
        assert targets.gate_targets(CPU_RUN | {"rows": [row]})[2].verdict == verdict
    assert (share.best, faster.best, gelu.best) == (pytest.approx(2), pytest.approx(12.5), None)
    around = targets.gate_targets(CPU_RUN | {"rows": [row | {"kept_flops": 0.6e9, "flops_around": 0.2e9}]})
    assert around[0].best == pytest.approx(4)
    copied = row | {"case": "stage 4", "bytes": 6e7}
    assert targets.gate_targets(CPU_RUN | {"rows": [copied]})[0].value == pytest.approx(0.01 / 0.006)
    assert "5.0 if caches hold them" in targets.gate_targets(CPU_RUN | {"rows": [copied]})[0].what
    assert targets.gate_targets({"device": "cpu", "dtype": "bfloat16", "rows": [row]}) == []


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_multiplications_around_products(direction):
    """A backward's and a forward's are those of both, and GELU's are more."""
    around = {d: flops_around(7, d, gelu=True) for d in DIRECTIONS}
    assert around[BOTH] == around[FORWARD] + around[BACKWARD]
    assert around[direction] > flops_around(7, direction, gelu=False) > 0


def test_gates_for_free():
    """What is measured in their place is the model without them, forward and backward."""
    model = bench_models.build(
        targets.GATELESS, bench_models.Setting(True, 2, 64, torch.device("cpu"), torch.float32)
    )
    assert not any(isinstance(m, PosSGU) for m in model.modules())
    gate = model.levels[0].blocks[0].gate
    x = torch.randn(2, 3, 3, gate.dim, requires_grad=True)
    z = gate(x)
    assert z.shape == (2, 3, 3, gate.dim // 2) and not z.any()
    assert gate(x).data_ptr() == z.data_ptr()
    assert not torch.autograd.grad(z.sum(), x)[0].any()


def test_targets_of_models():
    times = dict(zip((targets.OURS, *targets.RIVALS, targets.ORIGINAL), (6, 10, 8, 15), strict=True))
    times |= {f"{targets.RIVALS[0]}, compiled": 7}
    row = {
        "what": "training step",
        "batch": 8,
        "flops": 1e12,
        "ceilings": {"gemm": 2e11, "copy": 1e10},
        "times": {name: {"median": time} for name, time in times.items()},
        "memory": {targets.OURS: 6, targets.ORIGINAL: 8},
    }
    eager, compiled, faster, memory = targets.model_targets(CPU_RUN | {"rows": [row]})
    assert (eager.value, eager.bound, eager.best) == (0.75, 0.85, 5 / 8)
    assert eager.cells_with_best()[2:] == ("at most 0.85", "0.62", "yes")
    assert (compiled.value, compiled.bound) == (6 / 7, 0.95)
    assert (faster.value, faster.bound, faster.best, faster.verdict) == (2.5, 2.2, 3, "yes")
    assert (memory.value, memory.bound, memory.verdict) == (0.75, 0.6, "no")
    row["times"][f"{targets.OURS}, compiled"] = {"median": 5}
    assert targets.compiled_targets(CPU_RUN | {"rows": [row]})[0].value == 5 / 7
    eager, compiled, *_ = targets.model_targets(CPU_RUN | {"rows": [row]})
    assert (eager.value, compiled.value, compiled.best) == (0.75, 5 / 7, None)
    row["times"][targets.GATELESS] = {"median": 4}
    eager, _, faster, _ = targets.model_targets(CPU_RUN | {"rows": [row]})
    assert (eager.best, faster.best) == (0.5, 3.75)
    row["times"][targets.ORIGINAL] = {"median": 8.6}
    out_of_reach = targets.model_targets(CPU_RUN | {"rows": [row]})[2]
    assert (out_of_reach.best, out_of_reach.verdict) == (2.15, "out of reach")
    del row["times"][targets.OURS]
    assert targets.model_targets(CPU_RUN | {"rows": [row]}) == []


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_was_measured(document):
    text = document.read_text()
    assert (
        text.count("<!-- measured: ") == text.count("<!-- end -->") == {"README.md": 4}.get(document.name, 10)
    )
    filled = report.fill(text, report.load_cpu(), report.load_runs(report.RESULTS))
    assert filled == text, "run python -m benchmarks.report"


def test_figures(tmp_path):
    draw(report.load("cpu"), report.load("cpu_models"), tmp_path)
    names = {"benchmark_gate.png", "benchmark_scaling.png", "benchmark_models.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
