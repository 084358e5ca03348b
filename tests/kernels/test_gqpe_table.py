"""The quadratic table as an operator: its back ends against plain PyTorch, and PyTorch around it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import Layout, device_of, interpreted, over_backends
from torch.utils._python_dispatch import TorchDispatchMode

from posmlp_kernels import PosSGU, gqpe_table, use_backend
from posmlp_kernels.gqpe_table import ops, reference
from posmlp_kernels.testing import assert_no_worse, poisoned_memory

WINDOWS = [(1,), (5,), (4, 3), (1, 4), (14, 14), (2, 3, 2), (3, 1, 20)]
windows = pytest.mark.parametrize("window", WINDOWS, ids=str)
compiled = over_backends(without=["cuda", "reference"])
without_interpreter = over_backends(without=["cuda", "reference"], interpreter=False)


def make(window, groups=2, dtype=torch.float64, seed=0, far=0.0, device="cpu"):
    """Center, factor and a gradient that sums to about zero in every group, as a softmax's does."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rank = len(window)
    dtable = normal(groups, *(2 * w - 1 for w in window))
    dtable -= dtable.flatten(1).mean(1).view(-1, *(1,) * rank)
    center = normal(groups, rank) + far
    factor = torch.eye(rank, dtype=torch.float64) / 2 + normal(groups, rank, rank) / 8
    return tuple(t.to(device, dtype) for t in (center, factor, dtable))


def with_gradients(function, center, factor, dtable):
    center, factor = center.detach().requires_grad_(), factor.detach().requires_grad_()
    table = function(center, factor)
    dcenter, dfactor = torch.autograd.grad(table, (center, factor), dtable)
    return {"table": table.detach(), "dcenter": dcenter, "dfactor": dfactor}


def on(backend, window):
    return lambda center, factor: ops.run(backend, center, factor, window)


class Called(TorchDispatchMode):
    """The overloads of the table's ops that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "gqpe_table" in str(function):
            self.names.append(str(function).removeprefix("posmlp_kernels."))
        return function(*args, **(kwargs or {}))


# ---- values ----


@pytest.mark.parametrize("far", [0.0, 30.0, 1e3])
@windows
@compiled
def test_no_worse_than_plain_pytorch(backend, window, far):
    """In float32 against float64, near and far centres."""
    actual, eager, truth = [], [], []
    for seed in range(4 if interpreted(backend) else 16):
        inputs = make(window, dtype=torch.float32, seed=seed, far=far, device=device_of(backend))
        with poisoned_memory():
            actual.append(with_gradients(on(backend, window), *inputs))
        plain = lambda center, factor: reference.table(center, factor, window)  # noqa: E731
        eager.append(with_gradients(plain, *inputs))
        truth.append(with_gradients(plain, *(t.double().cpu() for t in inputs)))
    assert_no_worse(actual, eager, truth)


@windows
@compiled
def test_double(backend, window):
    inputs = make(window, device=device_of(backend))
    plain = lambda center, factor: reference.table(center, factor, window)  # noqa: E731
    actual, expected = with_gradients(on(backend, window), *inputs), with_gradients(plain, *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.skipif("cpu" not in ops.BACKENDS, reason="the cpu back end is not built")
def test_the_cpu_rounds_once():
    """Computed in double: the float32 results are the rounded float64 ones."""
    inputs = make((7, 7), groups=4, dtype=torch.float32)
    narrow = with_gradients(on("cpu", (7, 7)), *inputs)
    wide = with_gradients(on("cpu", (7, 7)), *(t.double() for t in inputs))
    assert all(torch.equal(narrow[name], wide[name].float()) for name in wide)


@pytest.mark.skipif("cpu" not in ops.BACKENDS, reason="the cpu back end is not built")
def test_same_bits_for_any_number_of_threads():
    window, before = (64, 64), torch.get_num_threads()  # a table large enough for a thread of its own
    inputs, results = make(window, groups=5, dtype=torch.float32), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(on("cpu", window), *inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r[name], results[0][name]) for r in results for name in r)


@compiled
def test_layouts(backend):
    """Parameters and gradients with any strides, 0 included, which is what `.sum()` hands back."""
    window = (3, 4)
    center, factor, dtable = make(window, device=device_of(backend))
    expected = with_gradients(on(backend, window), center, factor, dtable)
    permuted = (Layout((1, 0), 1)(center), Layout((2, 0, 1), 1)(factor), Layout((2, 0, 1), 1)(dtable))
    actual = with_gradients(on(backend, window), *permuted)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    constant = dtable[:, :1, :1]
    actual = with_gradients(on(backend, window), center, factor, constant.expand_as(dtable))
    expected = with_gradients(on(backend, window), center, factor, constant.expand_as(dtable).contiguous())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@compiled
def test_no_groups(backend):
    inputs = make((2, 3), groups=0, device=device_of(backend))
    results = with_gradients(on(backend, (2, 3)), *inputs)
    assert [list(r.shape) for r in results.values()] == [[0, 3, 5], [0, 2], [0, 2, 2]]


# ---- derivatives ----


@pytest.mark.parametrize("window", [(3,), (2, 3), (2, 1, 2)], ids=str)
@compiled
def test_gradients_and_their_gradients(backend, window):
    center, factor, _ = make(window, groups=1 if interpreted(backend) else 2, device=device_of(backend))
    leaves, fast = (center.requires_grad_(), factor.requires_grad_()), interpreted(backend)
    assert torch.autograd.gradcheck(on(backend, window), leaves, fast_mode=fast, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(on(backend, window), leaves, fast_mode=fast)


@pytest.mark.parametrize("wanted", [0, 1])
@compiled
def test_one_gradient_alone(backend, wanted):
    """Of the other parameter there is none, and gradients of gradients stay right."""
    center, factor, dtable = make((3, 2), device=device_of(backend))
    expected = with_gradients(on(backend, (3, 2)), center, factor, dtable)
    inputs = [center, factor]
    inputs[wanted].requires_grad_()
    on(backend, (3, 2))(*inputs).backward(dtable)
    assert torch.equal(inputs[wanted].grad, expected["dfactor" if wanted else "dcenter"])
    assert inputs[1 - wanted].grad is None

    def alone(leaf):
        return on(backend, (3, 2))(*([leaf, factor] if wanted == 0 else [center, leaf]))

    assert torch.autograd.gradgradcheck(alone, inputs[wanted], fast_mode=True)


@without_interpreter
def test_functional_transforms(backend):
    """vmap of grad, vmap of the table over each argument, and a Hessian: those of the reference."""
    window, device = (3, 2), device_of(backend)
    centers = torch.stack([make(window, seed=s, device=device)[0] for s in range(3)], 1)
    factors = torch.stack([make(window, seed=s, device=device)[1] for s in range(3)])
    results = []
    for name in (backend, "reference"):
        loss = lambda c, m: gqpe_table(c, m, window).sin().sum()  # noqa: E731
        with use_backend(name):
            results.append(
                [
                    *torch.vmap(torch.func.grad(loss, (0, 1)), (1, 0))(centers, factors),
                    torch.vmap(lambda c, m: gqpe_table(c, m, window), (1, None))(centers, factors[0]),
                    torch.func.jacrev(torch.func.grad(loss))(centers[:, 0], factors[0]),
                ]
            )
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


# ---- registration ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@compiled
def test_opcheck(backend, dtype):
    center, factor, dtable = make((3, 2), dtype=dtype, device=device_of(backend))
    forward, backward = ops.overloads(backend)
    center, factor, dtable = center.T.contiguous().T, factor.mT.contiguous().mT, dtable.mT.contiguous().mT
    torch.library.opcheck(forward, (center, factor, (3, 2)))
    torch.library.opcheck(backward, (dtable, center, factor, (3, 2)))
    for op, schema in ((forward, ops.FORWARD_SCHEMA), (backward, ops.BACKWARD_SCHEMA)):
        assert str(op._schema) == str(torch._C.parse_schema(f"{op._schema.name}.{backend}{schema}"))


@without_interpreter
def test_compile_and_export(backend):
    """Whole graphs that hold the op, in training too, and the choice of a back end as a guard."""
    center, factor, dtable = make((3, 2), dtype=torch.float32, device=device_of(backend))
    seen = []

    def record(graph, inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if "gqpe_table" in str(n.target)])
        return graph.forward

    def table(center, factor):
        return gqpe_table(center, factor, (3, 2))

    torch.compiler.reset()
    with torch.no_grad():
        recorded = torch.compile(table, fullgraph=True, backend=record)
        for _ in range(2):
            for name in (backend, "reference"):
                with use_backend(name):
                    torch.testing.assert_close(recorded(center, factor), table(center, factor))
    assert seen == [[f"posmlp_kernels.gqpe_table.{backend}"], []]

    whole = torch.compile(table, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        actual = with_gradients(whole, center, factor, dtable)
        torch.testing.assert_close(actual, with_gradients(table, center, factor, dtable))

        class Table(torch.nn.Module):
            def forward(self, center, factor):
                return table(center, factor)

        program = torch.export.export(Table(), (center, factor))
    assert ops.overloads(backend)[0] in [n.target for n in program.graph.nodes]
    torch.testing.assert_close(program.module()(center, factor), table(center, factor))
    torch.compiler.reset()


# ---- the public function ----


@compiled
def test_what_is_in_force_runs(backend):
    center, factor, dtable = make((3, 2), device=device_of(backend))
    center.requires_grad_()
    with Called() as called, use_backend(backend):
        gqpe_table(center, factor, (3, 2)).backward(dtable)
    assert called.names == [f"gqpe_table.{backend}", f"gqpe_table_backward.{backend}"]
    with Called() as called, use_backend("reference"):
        actual = gqpe_table(center, factor, (3, 2))
    assert called.names == [] and torch.equal(actual, reference.table(center, factor, (3, 2)))


@compiled
def test_a_layer_s_back_end_makes_its_table(backend):
    layer = PosSGU(4, (3, 2), groups=2, backend=backend, device=device_of(backend))
    with Called() as called:
        layer.relative_table()
    assert called.names == [f"gqpe_table.{backend}"]
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'nonsense'"):
        gqpe_table(layer.center, layer.factor, (3, 2), backend="nonsense")


@pytest.mark.skipif("cpu" not in ops.BACKENDS, reason="the cpu back end is not built")
@pytest.mark.parametrize("name", [None, "cuda", "cpu"])
def test_the_fastest_serves_where_the_named_one_cannot(name):
    with Called() as called, use_backend(name):
        gqpe_table(*make((3, 2))[:2], (3, 2))
        gqpe_table(*make((2, 1, 2, 2))[:2], (2, 1, 2, 2))  # four dimensions: the reference
        gqpe_table(*(t.to("meta") for t in make((3, 2))[:2]), (3, 2))
    assert called.names == ["gqpe_table.cpu"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@compiled
def test_inference_mode_and_autocast(backend, dtype):
    center, factor, _ = make((3, 2), dtype=dtype, device=device_of(backend))
    with use_backend(backend):
        expected = gqpe_table(center, factor, (3, 2))
        with torch.inference_mode(), torch.autocast(device_of(backend), torch.bfloat16):
            table = gqpe_table(center, factor, (3, 2))
    assert table.is_inference() and table.dtype == torch.float32 and torch.equal(table, expected)


def test_devices_must_agree():
    center, factor, _ = make((3, 2))
    with pytest.raises(ValueError, match="factor must be on center's device cpu, got meta"):
        gqpe_table(center, factor.to("meta"), (3, 2))


@pytest.mark.skipif("cpu" not in ops.BACKENDS, reason="the cpu back end is not built")
def test_the_bare_ops_read_nothing_out_of_bounds():
    center, factor, dtable = make((3, 2))
    forward, backward = ops.overloads("cpu")
    for wrong, message in (
        ((center, factor[:1], (3, 2)), r"factor must be \[S, d, d\]"),
        ((center, factor, (3,)), r"center must be \[S, 1\]"),
        ((center, factor, (3, 0)), "at least 1"),
        ((center, factor.float(), (3, 2)), "share a dtype"),
        ((center.half(), factor.half(), (3, 2)), "float32 or float64"),
        ((center, factor, (1, 1, 1, 1)), "1 to 3 sizes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*wrong)
    for wrong in (dtable[:1], dtable.float()):
        with pytest.raises(RuntimeError, match="dtable must have the table's"):
            backward(wrong, center, factor, (3, 2))


# ---- chips that are not here ----


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile(tmp_path):
    script = Path(__file__).with_name("gqpe_table_compiles.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {"table_kernel", "table_backward_kernel"}
    assert not [k for k in kernels if k["shared"] > k["limit"]]
