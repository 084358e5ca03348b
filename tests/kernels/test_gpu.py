"""What only a GPU can show: graphs, streams, several devices, launches, and x beyond 2^31 elements."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import available, device_of

from benchmarks.device import launches
from posmlp_kernels import PosSGU, pos_gate
from posmlp_kernels.testing import (
    Case,
    assert_gate_no_worse,
    assert_no_worse,
    find_case,
    make_inputs,
    run,
    run_eager,
    truth_of,
    with_gradients,
)

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="there is no GPU")]
# "triton" without a GPU is its interpreter, which has none of what is tested here.
BACKENDS = [name for name in ("triton", "cuda") if not GPU or (available(name) and device_of(name) == "cuda")]
over_gpu_backends = pytest.mark.parametrize("backend", BACKENDS)
CASES = [find_case(name) for name in ("shift_partial", "gelu_tanh_norm", "matrix_grouped")]
over_some_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def outcome(backend, case, inputs):
    return with_gradients(partial(run, backend=backend), case, inputs)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


# ---- graphs and streams ----


@over_some_cases
@over_gpu_backends
def test_a_graph_replays_forward_and_backward(backend, case):
    """Captured once, replayed on new values in the same memory: the bits of a plain call."""
    inputs, others = (make_inputs(case, device="cuda", seed=seed) for seed in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills caches, before the capture
        outcome(backend, case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = outcome(backend, case, inputs)
    for name, value in inputs.items():
        if value is not None:
            value.copy_(others[name])
    for result in results.values():
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(results, outcome(backend, case, others))


@over_gpu_backends
def test_a_side_stream_is_honoured(backend):
    """Work is launched where its input is made: after a long wait on that stream, nowhere else."""
    case = find_case("tiles")
    inputs = make_inputs(case, device="cuda")
    expected = outcome(backend, case, inputs)
    late = {name: None if t is None else torch.full_like(t, torch.nan) for name, t in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
        for name, value in late.items():
            if value is not None:
                value.copy_(inputs[name])
        actual = outcome(backend, case, late)
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU")
@over_gpu_backends
def test_another_device_than_the_current_one(backend):
    case = find_case("shift_partial")
    first, second = (outcome(backend, case, make_inputs(case, device=f"cuda:{i}")) for i in range(2))
    assert torch.cuda.current_device() == 0
    assert all(value.device.index == 1 for value in second.values())
    assert_same({name: value.cpu() for name, value in second.items()}, {n: v.cpu() for n, v in first.items()})


@over_gpu_backends
def test_reduced_overhead(backend):
    """torch.compile with CUDA graphs, forward and backward, call after call."""
    torch.manual_seed(0)
    layer = PosSGU(24, 3, groups=2, activation="gelu", backend=backend, device="cuda")
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(2, 5, 7, 24, device="cuda")
        results = []
        for function in (compiled, layer):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = x.clone().requires_grad_()
            z = function(leaf)
            gradients = torch.autograd.grad(z.square().sum(), [leaf, *layer.parameters()])
            results.append([t.detach().clone() for t in (z, *gradients)])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# ---- numbers ----


@over_some_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_gpu_backends
def test_same_bits_from_run_to_run(backend, dtype, case):
    inputs = make_inputs(case, dtype, "cuda", parameter_dtype=torch.float32)
    first = outcome(backend, case, inputs)
    for _ in range(20):
        assert_same(outcome(backend, case, inputs), first)


@over_gpu_backends
def test_same_bits_at_a_size_that_fills_the_gpu(backend):
    """Thousands of windows: sums over shares, by programs that end in any order."""
    torch.manual_seed(0)
    layer = PosSGU(384, 14, groups=8, backend=backend, device="cuda")
    x = torch.randn(16, 56, 56, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dz = torch.randn(16, 56, 56, 192, device="cuda", dtype=torch.bfloat16)
    leaves = [x, *layer.parameters()]
    first, *others = (torch.autograd.grad(layer(x), leaves, dz) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@over_gpu_backends
def test_autocast(backend):
    """A float32 layer behind a bfloat16 product: float32 gradients, no worse than eager's."""

    def gate(case, inputs):
        with torch.autocast("cuda", torch.bfloat16):
            return run(case, inputs, backend)

    results = assert_gate_no_worse(gate, find_case("shift_partial"), torch.bfloat16, "cuda", torch.float32)
    for name, value in results[0].items():
        assert value.dtype == (torch.bfloat16 if name in ("z", "dx") else torch.float32), name


# ---- launches and sizes ----


@over_gpu_backends
def test_a_forward_is_at_most_two_launches(backend):
    layer = PosSGU(384, 14, groups=8, backend=backend, device="cuda", dtype=torch.bfloat16).eval()
    table, bias = layer.relative_table().detach(), layer.bias.detach().float()
    x = torch.randn(1, 56, 56, 384, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        ran = launches(lambda: pos_gate(x, table, bias, window=14, softmax=True, backend=backend))
    if ran is None:
        pytest.skip("the profiler sees no kernels on this machine")
    assert len(ran) <= 2, ran


@over_gpu_backends
def test_more_elements_than_32_bits_count(backend):
    """The last windows lie beyond 2^31 elements of x; the sums over all windows are finite.

    Values and dx are held to the reference on the first and the last images alone.
    """
    image = 56 * 56 * 2 * 96
    batch = 2**31 // image + 3
    needed = 4 * 2 * batch * image  # bytes: x, dx, z and dz in bfloat16, and room for what the kernels keep
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    case = Case("huge", "addresses need 64 bits", (56, 56), (14, 14), 2, 96, 1, shift=(3, 5))
    inputs = make_inputs(case, torch.bfloat16, "cuda", parameter_dtype=torch.float32)
    torch.manual_seed(0)
    inputs |= {
        name: torch.randn(batch, *inputs[name].shape[1:], device="cuda", dtype=torch.bfloat16)
        for name in ("x", "dz")
    }
    assert inputs["x"].numel() > 2**31
    results = outcome(backend, case, inputs)
    assert all(results[name].isfinite().all() and results[name].any() for name in ("dtable", "dbias"))
    for part in (slice(0, 2), slice(batch - 2, batch)):
        some = inputs | {name: inputs[name][part] for name in ("x", "dz")}
        columns = [{n: results[n][part] for n in ("z", "dx")}, with_gradients(run_eager, case, some)]
        columns.append(truth_of(case, some))
        assert_no_worse(*({n: column[n] for n in ("z", "dx")} for column in columns))
