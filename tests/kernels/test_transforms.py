"""PyTorch around the operator: vmap and torch.func, autocast, inference mode, checkpointing, threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support import device_of, interpreted, over_backends, seeds_of, strided_case

from posmlp_kernels import PosSGU, pos_gate
from posmlp_kernels.pos_gate import reference
from posmlp_kernels.problem import check
from posmlp_kernels.testing import assert_gate_no_worse, assert_no_worse, find_case, make_inputs, run

TOLERANCE = {"rtol": 0, "atol": 1e-11}  # float64: the order of sums may differ, nothing else


def make_gate(backend):
    case = strided_case(backend)
    inputs = make_inputs(case, torch.float64, device_of(backend))
    gate = lambda x, table, bias: run(case, {**inputs, "x": x, "table": table, "bias": bias}, backend)  # noqa: E731
    return gate, inputs


@over_backends(interpreter=False)
def test_vmap_over_each_argument(backend):
    gate, inputs = make_gate(backend)
    x, table, bias = inputs["x"], inputs["table"], inputs["bias"]
    xs, tables, biases = (torch.stack([t, 2 * t, -t]) for t in (x, table, bias))
    for stacked, axes in (((xs, table, bias), (0, None, None)), ((x, tables, biases), (None, 0, 0))):
        mapped = torch.vmap(gate, axes)(*stacked)
        for k in range(3):
            one = gate(*(t if axis is None else t[k] for t, axis in zip(stacked, axes, strict=True)))
            torch.testing.assert_close(mapped[k], one, **TOLERANCE)


@over_backends(interpreter=False)
def test_vmap_over_another_dimension_and_nested(backend):
    gate, inputs = make_gate(backend)
    x, table, bias = inputs["x"], inputs["table"], inputs["bias"]
    xs = torch.stack([x, 2 * x], 2)  # [B, H, 2, W, 2C]
    mapped = torch.vmap(gate, (2, None, None), out_dims=1)(xs, table, bias)
    torch.testing.assert_close(mapped[:, 1], gate(2 * x, table, bias), **TOLERANCE)
    pairs = torch.stack([torch.stack([x, -x]), torch.stack([2 * x, x])])
    nested = torch.vmap(torch.vmap(gate, (0, None, None)), (0, None, None))(pairs, table, bias)
    torch.testing.assert_close(nested[1, 0], gate(2 * x, table, bias), **TOLERANCE)


@over_backends()
def test_per_sample_gradients(backend):
    """vmap(grad): one table gradient per image, which sum to the batch's."""
    gate, inputs = make_gate(backend)
    x, dz = inputs["x"], inputs["dz"]

    def loss(table, bias, image, weight):
        return (gate(image[None], table, bias) * weight[None]).sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    per_sample = torch.vmap(gradient, (None, None, 0, 0))(inputs["table"], inputs["bias"], x, dz)
    leaves = [inputs[n].requires_grad_() for n in ("table", "bias", "x")]
    batch = torch.autograd.grad(gate(leaves[2], *leaves[:2]), leaves, dz)
    for sample, whole in zip(per_sample[:2], batch[:2], strict=True):
        assert sample.shape == (len(x), *whole.shape)
        torch.testing.assert_close(sample.sum(0), whole, **TOLERANCE)
    torch.testing.assert_close(per_sample[2], batch[2], **TOLERANCE)


@over_backends(interpreter=False)
def test_functional_hessian_vector_product(backend):
    """grad of grad inside torch.func is the reference's."""
    values = []
    for name in (backend, "reference"):
        gate, inputs = make_gate(name)

        def loss(table, gate=gate, inputs=inputs):
            return gate(inputs["x"], table, inputs["bias"]).square().sum()

        direction = inputs["table"].flip(0)
        product = torch.func.grad(lambda t, d=direction, f=loss: (torch.func.grad(f)(t) * d).sum())
        values.append(product(inputs["table"]).cpu())
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-11)


@over_backends(interpreter=False)
def test_ensemble_of_layers(backend):
    """functional_call over stacked parameters: three layers on one input in one vmap."""
    torch.manual_seed(0)
    make = lambda: PosSGU(8, 3, groups=2, backend=backend, device=device_of(backend), dtype=torch.float64)  # noqa: E731
    layers = [make() for _ in range(3)]
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64, device=device_of(backend))
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    mapped = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    for layer, z in zip(layers, mapped, strict=True):
        torch.testing.assert_close(z, layer(x), **TOLERANCE)


@pytest.mark.parametrize("encoding", ["gqpe", "lrpe_m", "sgu"])
@over_backends(interpreter=False)
def test_autocast(backend, encoding):
    """float32 parameters, bfloat16 x from the layer before: bfloat16 out, float32 gradients, and no error
    beyond that of plain PyTorch in bfloat16."""
    draws = [autocast_step(backend, encoding, seed) for seed in seeds_of(backend)]
    assert_no_worse(*map(list, zip(*draws, strict=True)))


def autocast_step(backend, encoding, seed):
    """z of a random layer under autocast, of plain PyTorch in bfloat16, and in float64."""
    torch.manual_seed(seed)
    device = device_of(backend)
    gate = PosSGU(16, 3, groups=2, encoding=encoding, backend=backend, device=device)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    linear = torch.nn.Linear(16, 16, device=device)
    x = torch.randn(2, 4, 5, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        hidden = linear(x)
        z = gate(hidden)
    assert hidden.dtype == z.dtype == torch.bfloat16
    z.float().square().sum().backward()
    for layer in (gate, linear):
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())

    wide = copy.deepcopy(gate).double()
    wide.backend = "reference"
    return z, plain_in_bfloat16(gate, hidden.detach()), wide(hidden.detach().double()).cpu()


def plain_in_bfloat16(layer, x):
    """What a user's own PyTorch would compute in x's dtype from the layer's parameters."""
    half = copy.deepcopy(layer).bfloat16()
    table = None if layer.relative_table() is None else layer.relative_table().bfloat16()
    norm = None if half.norm is None else (half.norm.weight, half.norm.bias, half.norm.eps)
    problem = check(
        x, table, half.bias, half.matrix, norm, window=3, softmax=layer.softmax, shift=None, activation="none"
    )
    return reference.gate(x, table, half.bias, half.matrix, *(norm or (None, None))[:2], problem)


@over_backends(interpreter=False)
def test_autocast_leaves_wide_inputs_wide(backend):
    """The operator computes in x's dtype: a float32 x is not rounded behind the user's back."""

    def gate(case, inputs):
        with torch.autocast(device_of(backend), torch.bfloat16):
            return run(case, inputs, backend)

    seeds = seeds_of(backend)
    results = assert_gate_no_worse(gate, strided_case(backend), device=device_of(backend), seeds=seeds)
    assert results[0]["z"].dtype == torch.float32


@over_backends(interpreter=False)
def test_layer_with_wide_inputs_under_autocast(backend):
    """The table is not rounded either: a rounded exponent is a wrong weight."""
    torch.manual_seed(0)
    layer = PosSGU(8, 3, groups=2, backend=backend, device=device_of(backend))
    x = torch.randn(2, 4, 5, 8, device=device_of(backend))
    expected = layer(x)
    with torch.autocast(device_of(backend), torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


@over_backends()
def test_inference_mode(backend):
    case = strided_case(backend)
    inputs = make_inputs(case, device=device_of(backend))
    expected = run(case, inputs, backend)
    with torch.inference_mode():
        z = run(case, {**inputs, "x": inputs["x"].clone()}, backend)
    assert z.is_inference() and torch.equal(z, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@over_backends(interpreter=False)
def test_activation_checkpointing(backend, use_reentrant):
    torch.manual_seed(0)
    layer = PosSGU(8, 3, groups=2, activation="gelu", backend=backend, device=device_of(backend))
    x = torch.randn(2, 5, 4, 8, device=device_of(backend), requires_grad=True)
    results = []
    for forward in (
        layer,
        lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant),
    ):
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        forward(x).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@over_backends(interpreter=False)
def test_threads_share_the_operator(backend):
    """Several Python threads at once: no shared scratch memory is mixed up."""
    if interpreted(backend):
        pytest.skip(
            "Triton's interpreter patches its language module while it runs, so it is not thread-safe"
        )
    cases = [find_case(n) for n in ("shift_partial", "published_window", "gelu_tanh_norm", "far_centres")]
    inputs = [make_inputs(case, device=device_of(backend)) for case in cases]
    expected = [run(c, i, backend) for c, i in zip(cases, inputs, strict=True)]
    wrong = []

    def work(k):
        for _ in range(20):
            if not torch.equal(run(cases[k], inputs[k], backend), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@over_backends()
def test_large_sparse_addresses(backend):
    """A view whose elements lie more than 2^31 apart in address units is read by 64-bit offsets."""
    if device_of(backend) == "cuda" or interpreted(backend):
        pytest.skip("needs memory that only an operating system hands out lazily")
    stride = 2**31 + 64  # elements; a page is touched only where it is written
    storage = torch.empty(stride + 64, dtype=torch.float16)
    x = storage.as_strided((2, 4, 4), (stride, 4, 1))
    x.copy_(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)))
    table = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    z = pos_gate(x, table, window=3, softmax=True, backend=backend)
    assert torch.equal(z, pos_gate(x.clone(), table, window=3, softmax=True, backend=backend))
