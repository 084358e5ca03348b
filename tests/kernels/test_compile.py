"""torch.compile and torch.export: whole graphs, and one of them for all batch and map sizes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support import device_of, interpreted, over_backends

from posmlp_kernels import PosSGU, pos_gate, use_backend

# Partial windows in all of them. No two sizes are equal in the first, and none is a parameter's: equal sizes
# share a symbol, and a parameter's are fixed.
SIZES = [(3, 6, 9), (4, 10, 11), (6, 13, 4), (9, 3, 10)]
CHANNELS = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_layer(backend, encoding="gqpe", **options):
    torch.manual_seed(0)
    options = {"groups": 2, "shift": (1, 2), "backend": backend, "device": device_of(backend)} | options
    layer = PosSGU(CHANNELS, (4, 3), encoding=encoding, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return layer


def make_x(backend, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, CHANNELS, generator=generator).to(device_of(backend))


def step(function, layer, x, with_grad):
    """The output, and with gradients those of x and of each parameter."""
    if not with_grad:
        with torch.no_grad():
            return [function(x)]
    x = x.clone().requires_grad_()
    layer.zero_grad()
    z = function(x)
    z.square().sum().backward()
    return [z.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("with_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("encoding", ["gqpe", "lrpe_m", "sgu"])
@over_backends(without=["reference"])
def test_one_graph_for_all_sizes(backend, encoding, with_grad):
    """The second size makes sizes symbolic; after that any recompilation is an error."""
    if interpreted(backend) and (encoding, with_grad) != ("gqpe", True):
        pytest.skip("interpreted Triton is slow; the graph is the same for each back end")
    options, sizes = {"norm": True, "activation": "gelu"}, SIZES
    if interpreted(backend):  # small maps, and no more of them than it takes to see a recompilation
        options, sizes = {"shift": None}, [(3, 6, 4), (4, 3, 4), (6, 9, 4)]
    layer = make_layer(backend, encoding, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for number, size in enumerate(sizes):
        x = make_x(backend, size)
        expected = step(layer, layer, x, with_grad)
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            actual = step(layer, compiled, x, with_grad)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@over_backends(without=["reference"], interpreter=False)
def test_marked_dynamic_never_recompiles(backend):
    """With `dynamic=True` the very first graph serves every size, for the function as for the layer."""
    layer = make_layer(backend)
    table = layer.relative_table().detach()

    def gate(x):
        return pos_gate(x, table, layer.bias, window=(4, 3), softmax=True, backend=backend)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in SIZES:
            x = make_x(backend, size)
            torch.testing.assert_close(compiled(x), gate(x), rtol=0, atol=1e-6)
    assert counter.frame_count == 1


@over_backends(interpreter=False)
def test_eval_layer_follows_its_parameters(backend):
    """The cache of a frozen layer is no constant of the graph."""
    layer = make_layer(backend).eval().requires_grad_(False)
    x = make_x(backend, SIZES[0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer(x)  # fills the cache first
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-6)
        layer.center.data.add_(1)


@over_backends(without=["reference"], interpreter=False)
def test_the_choice_of_a_back_end_is_a_guard(backend):
    """`use_backend` counts for compiled code too, inside it and around it, and costs one graph for each."""
    layer, x, called = make_layer(None, device=device_of(backend)), make_x(backend, SIZES[0]), []

    def record(graph, inputs):
        called.append([n.target for n in graph.graph.nodes if "pos_gate" in str(n.target)])
        return graph.forward

    @torch.compile(fullgraph=True, backend=record)
    def inside(x):
        with use_backend("reference"):
            return layer(x)

    compiled = torch.compile(layer, fullgraph=True, backend=record)
    op = getattr(torch.ops.posmlp_kernels.pos_gate, backend)
    with torch.no_grad():
        for _ in range(2):
            for name in (backend, "reference"):
                with use_backend(name):
                    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-6)
        assert called == [[op], []]
        with use_backend(backend):
            inside(x)
    assert called == [[op], [], []]


@over_backends(interpreter=False)
def test_inductor(backend):
    """The default compiler, once: code generated around the op, linear layers before and after."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, CHANNELS),
        make_layer(backend, activation="gelu"),
        torch.nn.Linear(CHANNELS // 2, 4),
    ).to(device_of(backend))
    x = torch.randn(2, 5, 7, 4, device=device_of(backend))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        step(model, compiled, x, True), step(model, model, x, True), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("encoding", ["gqpe", "gqpe_isotropic", "lrpe_m", "sgu"])
@over_backends(without=["reference"], interpreter=False)
def test_export_with_dynamic_sizes(backend, encoding):
    layer = make_layer(backend, encoding).eval()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    with torch.no_grad():
        program = torch.export.export(layer, (make_x(backend, SIZES[0]),), dynamic_shapes={"x": dims})
        called = [n.target for n in program.graph.nodes if n.op == "call_function"]
        assert getattr(torch.ops.posmlp_kernels.pos_gate, backend) in called
        for size in SIZES:
            x = make_x(backend, size)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-6)


@over_backends(interpreter=False)
def test_export_of_a_training_layer(backend):
    """Static sizes, strict and not; parameters stay parameters of the program."""
    layer, x = make_layer(backend), make_x(backend, SIZES[0])
    for strict in (True, False):
        program = torch.export.export(layer, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-6)
        assert set(program.state_dict) == set(layer.state_dict())


@over_backends(interpreter=False)
def test_compile_inside_autocast(backend):
    layer = make_layer(backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = make_x(backend, SIZES[0]).bfloat16()
    with torch.autocast(device_of(backend), torch.bfloat16):
        torch.testing.assert_close(step(layer, compiled, x, True), step(layer, layer, x, True))


@over_backends(interpreter=False)
def test_vmap_of_grad_compiles(backend):
    """Per-sample gradients as one graph."""
    layer = make_layer(backend)
    table = layer.relative_table().detach()

    def loss(table, image):
        z = pos_gate(image[None], table, window=(4, 3), softmax=True, backend=backend)
        return z.square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))
    x = make_x(backend, (2, 5, 4))
    compiled = torch.compile(per_sample, backend="aot_eager")
    torch.testing.assert_close(compiled(table, x), per_sample(table, x), rtol=1e-5, atol=1e-5)


@over_backends(interpreter=False)
def test_bad_input_under_compile_keeps_its_message(backend):
    layer = make_layer(backend)
    compiled = torch.compile(
        lambda x: pos_gate(x, layer.table_of_wrong_shape, window=3, softmax=True), backend="eager"
    )
    layer.table_of_wrong_shape = torch.ones(2, 3, 3)
    with pytest.raises(Exception, match=r"table must be \[S, 2\*3-1, 2\*3-1\]"):
        compiled(make_x(backend, SIZES[0]))
