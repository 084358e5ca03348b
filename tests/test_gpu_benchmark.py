"""What of the GPU's benchmark can be shown without a GPU: its plan, its processes, its tables and targets."""

import json
import sys
import time

import pytest
import torch

from benchmarks import bench_launch, bench_models, bench_pos_gate, gpu, gpu_steps, report
from benchmarks.attempts import Attempts
from benchmarks.device import DeviceClock, host_seconds, launches
from benchmarks.gate_cases import SUITES
from benchmarks.gpu_tables import NOT_YET, details_of, load_runs, summary_of
from benchmarks.gpu_targets import gpu_targets
from benchmarks.processes import Processes

FULL = gpu_steps.Options("cuda", False, ("cuda", "triton"), True)
PARSERS = {
    "benchmarks.bench_pos_gate": bench_pos_gate.parser,
    "benchmarks.bench_models": bench_models.parser,
    "benchmarks.bench_launch": bench_launch.parser,
}


# ---- the plan ----


def all_steps(options):
    steps = gpu_steps.measurements(gpu_steps.PARTS, options)
    return steps + gpu_steps.rehearsals(gpu_steps.PARTS, options, {})


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_one_that_its_program_takes(device, quick):
    for step in all_steps(gpu_steps.Options(device, quick, ("triton",), True)):
        module, *arguments = step.command[2:]
        filled = ["1" if word in ("{limit}", "{out}") else word for word in arguments]
        given = PARSERS[module]().parse_args(filled)
        assert given.device.type == device
        if module == "benchmarks.bench_pos_gate" and given.case:
            assert set(given.case) <= {case.name for case in SUITES[given.suite]}


def test_names_are_distinct():
    names = [step.name for step in all_steps(FULL) + gpu_steps.tests(FULL, 8)]
    assert len({gpu.slug(name) for name in names}) == len(names)


def test_parts_are_chosen():
    assert gpu_steps.measurements(["test"], FULL) == []
    assert {step.name.split()[0] for step in gpu_steps.measurements(["gate"], FULL)} == {"gate", "launch"}
    assert {step.name.split()[0] for step in gpu_steps.preparations(["test"], FULL, 4)} == {"test"}
    shards = [step.command[-1] for step in gpu_steps.tests(FULL, 3)]
    assert shards == ["0/3", "1/3", "2/3"]


def test_rehearsals_compile_each_model_alone_and_keep_nothing():
    steps = gpu_steps.rehearsals(["models"], FULL, {"A": "1"})
    assert len(steps) == 2 * len(gpu_steps.OURS + gpu_steps.THEIRS)
    assert all(not step.kept and step.environment == {"A": "1"} for step in steps)
    without = gpu_steps.rehearsals(["models"], gpu_steps.Options("cuda", False, (), False), {})
    assert len(without) == 2 * len(gpu_steps.OURS)


def test_slug():
    assert gpu.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu.slug("NVIDIA A100-SXM4 (80GB)") == "nvidia-a100-sxm4-80gb"


# ---- processes ----


@pytest.fixture
def processes(tmp_path):
    return Processes(tmp_path, time.monotonic() + 60)


def python(code):
    return (sys.executable, "-c", code)


def test_a_process_that_succeeds(processes, tmp_path):
    record = processes.run(
        "good", (*python("import sys; print(sys.argv[1:])"), "{limit}", "{out}"), 20, out=tmp_path
    )
    assert record["outcome"] == "ok"
    assert record["said"] == str(["16", str(tmp_path)])
    assert processes.records == [record]


def test_a_process_that_fails(processes, capsys):
    record = processes.run("bad", python("print('why'); raise SystemExit(3)"), 20)
    assert (record["outcome"], record["said"]) == ("failed with 3", "why")
    assert "why" in capsys.readouterr().out
    assert processes.run("missing", ("no-such-program",), 20)["outcome"].startswith("failed: ")


def test_a_process_that_hangs_is_stopped_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.processes._LEAST", 0.0)
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    processes = Processes(tmp_path, time.monotonic() + 60)
    assert processes.run("hang", python(code), 1.5)["outcome"].startswith("stopped after")
    time.sleep(3)
    assert not mark.exists()


def test_after_the_deadline_only_what_must_run_does(tmp_path):
    processes = Processes(tmp_path, time.monotonic())
    assert processes.run("step", python("pass"), 20)["outcome"] == "left out: the time was up"
    assert processes.run("report", python("pass"), 20, late=True)["outcome"] == "ok"


def test_results_are_written_after_each_step(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    run = gpu.Run(processes, tmp_path / "gpu.json", {"processor": "GPU"}, {"earlier": {}})
    write = "import sys; open(sys.argv[1], 'w').write('[1]'); "
    steps = [gpu_steps.Step("crash", (*python(write + "raise SystemExit(1)"), "{out}"), 20, kept=True)]
    steps.append(gpu_steps.Step("not kept", (*python(write), "{out}"), 20))
    for step in steps:
        run(step)
        written = json.loads(run.path.read_text())
        assert written["steps"][-1]["step"] == step.name
    assert written["parts"] == {"earlier": {}, "crash": [1]}
    assert not run.together(steps, 2)


def test_parts_of_the_same_commit_are_kept(tmp_path):
    path, about = tmp_path / "gpu.json", {"commit": "abc", "torch": "2", "triton": "3"}
    assert gpu.earlier_parts(path, about) == {}
    path.write_text(json.dumps({"machine": about, "parts": {"gate stages": 1}}))
    assert gpu.earlier_parts(path, about) == {"gate stages": 1}
    assert gpu.earlier_parts(path, about | {"commit": "def"}) == {}
    for commit in ("abc+", "unknown"):  # what was changed since may be anything
        changed = about | {"commit": commit}
        path.write_text(json.dumps({"machine": changed, "parts": {"gate stages": 1}}))
        assert gpu.earlier_parts(path, changed) == {}


def test_a_run_of_one_part(tmp_path, monkeypatch, capsys):
    """From the probe to the report, with the cheapest part between them."""
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    assert gpu.main(["--device", "cpu", "--quick", "--only", "sanitize"]) == 0
    assert "compute-sanitizer: not here" in capsys.readouterr().out
    (run,) = load_runs(tmp_path)
    assert [step["step"] for step in run["steps"]] == ["probe"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    assert gpu.main(["--only", "gate"]) == 1
    assert "there is no GPU that torch can use" in capsys.readouterr().out


def test_attempts_name_what_failed_and_stop_in_time():
    attempts = Attempts()
    assert attempts("fine", lambda x: x, 3) == 3
    assert attempts("wrong", lambda: 1 / 0) is None
    assert attempts.failures == {"wrong": "ZeroDivisionError: division by zero"}
    late = Attempts(time.monotonic() - 1)
    assert late("late", lambda: 3) is None
    assert late.failures == {"late": "left out: the time was up"}


# ---- the device's clock, on a stand-in for a GPU ----


@pytest.fixture
def calls(monkeypatch):
    """The order of what torch.cuda is asked for; an event takes place when the host gets there."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")
            self.time = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    properties = type("Properties", (), {"L2_cache_size": 1024})()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return calls


def test_the_device_is_kept_waiting_while_the_host_launches(calls):
    clock = DeviceClock(torch.device("cpu"))

    def work():
        calls.append("work")
        time.sleep(0.01)

    times = clock.burst(work)
    runs = len(times)
    assert 1 <= runs <= 3
    assert calls == [
        "synchronize",
        "work",
        "synchronize",
        *["sleep", "event", "work", "event"] * runs,
        "synchronize",
    ]
    assert all(0.01 <= seconds < 1 for seconds in times)
    assert 1 <= len(clock.burst(lambda: None)) <= 30


def test_what_the_profiler_does_not_see_is_unknown(calls):
    assert launches(lambda: torch.ones(3).sum()) is None


def test_host_time():
    assert 0.001 <= host_seconds(lambda: time.sleep(0.001), runs=5) < 1


# ---- targets and tables ----


def row_of(case, direction, times, flops=1e12):
    return {
        "case": case,
        "direction": direction,
        "shape": {"batch": 128},
        "flops": flops,
        "bytes": 4e9,
        "times": {name: {"median": time, "spread": 0.0} for name, time in times.items()},
        "errors": {"triton": {"z": 1.25, "dx": 1.5}},
        "failures": {"cuda": "RuntimeError: wrong | bad"},
        "ceilings": {"copy": 4e12, "gemm": 8e14},
    }


def run_of(*rows, dtype="bfloat16", **others):
    gate = {"dtype": dtype, "backends": ["cuda", "triton"], "rows": list(rows)}
    gate["ceilings"] = {"copy": {"median": 4e12}, "gemm": {"median": 8e14}}
    versions = dict.fromkeys(("torch", "triton", "commit", "date"), "1")
    return {"machine": {"processor": "GPU"} | versions, "steps": [], "parts": {"gate stages": gate} | others}


def test_targets_of_stages():
    forward = {"triton": 1.25e-3, "triton, gelu": 2e-3, "plain, compiled": 5e-3, "original": 0.01}
    rows = [
        row_of("stage 1", "forward", forward),
        row_of("stage 1", "backward", {"triton": 2e-3, "cuda": 1.6e-3}),
    ]
    copy, gelu, compiled, original, backward = gpu_targets(run_of(*rows))
    assert (copy.value, copy.bound, copy.verdict) == (pytest.approx(0.8), 0.85, "no")
    assert (gelu.value, gelu.bound, gelu.verdict) == (pytest.approx(0.5), 0.8, "no")
    assert (compiled.value, compiled.bound, compiled.verdict) == (pytest.approx(4), 3, "yes")
    assert (original.value, original.bound) == (pytest.approx(8), 10)
    assert (backward.value, backward.bound) == (pytest.approx(0.625), 0.65)  # by the faster back end
    (wide,) = gpu_targets(run_of(rows[1], dtype="float32"))
    assert (wide.value, wide.bound) == (pytest.approx(1e12 / 1.6e-3 / 8e14), pytest.approx(0.55))


def test_targets_of_other_gates_take_the_limit_that_decides():
    (target,) = gpu_targets(run_of(row_of("window 24, 24²", "forward", {"triton": 5e-3}, flops=3.2e12)))
    assert (target.value, target.bound) == (pytest.approx(0.8), 0.5)
    assert gpu_targets(run_of(row_of("stage 4", "forward + backward", {"triton": 1.0}))) == []
    assert gpu_targets(run_of(row_of("stage 1", "forward", {"plain": 1.0}))) == []


def test_targets_of_launches_and_models():
    launch = {"rows": [{"case": "stage 1", "backend": "triton", "host": 4e-5, "kernels": ["a", "b"]}]}
    times = {"posmlp_tiny": 0.2, "convnext_tiny": 0.25, "swin_tiny_patch4_window7_224": 0.16}
    times |= {"posmlp_tiny, compiled": 0.1}
    row = {"what": "inference", "batch": 256, "times": {n: {"median": t} for n, t in times.items()}}
    run = run_of(launch=launch, **{"models inference": {"rows": [row | {"memory": {"posmlp_tiny": 2**30}}]}})
    host, kernels, eager = gpu_targets(run)
    assert (round(host.value), host.verdict, kernels.value, kernels.verdict) == (40, "no", 2, "yes")
    assert (eager.value, eager.bound) == (1.25, 1)
    text = details_of([run])
    assert "| inference, batch 256 | posmlp_tiny | 1280 | 2560 | 1.0 GiB | – |" in text
    assert "| stage 1 | triton | 40.0 µs | 2 |" in text


def test_tables():
    times = {"triton": 1.25e-3, "plain": 5e-3, "original": 0.01}
    run = run_of(row_of("stage 1", "forward", times))
    text = details_of([run])
    cells = "1250.0 ± 0.0 µs | 4000.0 | 3200 | 80 % | 100 % | 4.0 x | – | 8.0 x | – | – | 1.2 x |"
    assert f"| stage 1, forward, bfloat16, batch 128 | triton | {cells}" in text
    assert "| cuda | RuntimeError: wrong / bad |" in text
    assert "| stage 1, forward (triton) | 1250.0 ± 0.0 µs | 80 % | 4.0 x | – | 8.0 x | – |" in summary_of(
        [run]
    )
    widths = {line.count("|") for line in text.splitlines() if " batch 128 | " in line}
    assert len(widths) == 1
    assert "4000 GB/s in a copy, bfloat16 800 TFLOP/s" in text


def test_nothing_is_claimed_before_it_is_measured(tmp_path):
    assert summary_of([]) == details_of([]) == NOT_YET
    (tmp_path / "cpu.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "list.json").write_text("[]")
    assert load_runs(tmp_path) == []
    (tmp_path / "gpu.json").write_text(json.dumps(run_of()))
    assert len(load_runs(tmp_path)) == 1
    documents = [document.read_text() for document in report.DOCUMENTS]
    if not load_runs(report.RESULTS):
        assert all(NOT_YET in text for text in documents)


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.gpu_plots import draw

    times = {"triton": 1.25e-3, "plain, compiled": 5e-3}
    models = {"rows": [{"what": "inference", "batch": 256, "times": {"posmlp_tiny": {"median": 1.0}}}]}
    run = run_of(row_of("stage 1", "forward", times), **{"models inference": models})
    draw(run, tmp_path / "new" / "gpu.png")
    draw(run_of(), tmp_path / "empty.png")
    assert (tmp_path / "new" / "gpu.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 0
