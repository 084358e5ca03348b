"""Values and gradients of every back end, case by case: no worse than plain PyTorch in the same dtype."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import (
    SAMPLE,
    available,
    device_of,
    interpreted,
    over_backends,
    over_cases,
    seeds_of,
    skip_if_interpreter_lacks,
    slow_to_start,
)

from posmlp_kernels import gqpe_table, pos_gate
from posmlp_kernels.testing import (
    CASES,
    PARAMETERS,
    Case,
    assert_gate_no_worse,
    assert_no_worse,
    find_case,
    make_inputs,
    poisoned_memory,
    run,
    truth_of,
    with_gradients,
)


def assert_case_no_worse(backend, case, dtype, parameter_dtype=None):
    gate, seeds = partial(run, backend=backend), seeds_of(backend, case)
    return assert_gate_no_worse(gate, case, dtype, device_of(backend), parameter_dtype, seeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@over_cases()
def test_no_worse_than_eager(backend, case, dtype):
    skip_if_interpreter_lacks(backend, dtype)
    assert_case_no_worse(backend, case, dtype)


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize(
    "case",
    [
        Case("long_line", "blocks of keys in a row", (1030,), (1024,), 2, 30, 2, False, "learned"),
        Case("long_matrix", "weights side by side", (900,), (900,), 1, 48, 1, False, "none", "shared"),
        Case("large_square", "blocks that end with rows", (32, 32), (32, 32), 2, 24, 1, False, "learned"),
    ],
    ids=lambda case: case.name,
)
def test_sums_over_many_keys(case):
    """One long sum in float32 would be three times as far off as eager's, which are made of short ones."""
    assert_case_no_worse("cpu", case, torch.float32)


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        Case("whole", "a window's columns in one panel", (28, 28), (7, 7), 4, 96, 4),
        Case("cut", "panels that end amid a window", (28, 28), (7, 7), 3, 60, 5, activation="gelu"),
        Case("shifted", "edges of few windows", (30, 27), (7, 4), 4, 96, 4, shift=(3, 2)),
        Case("line", "rows as long as a window", (2000,), (40,), 2, 48, 1),
    ],
    ids=lambda case: case.name,
)
def test_many_small_windows(case, threads):
    """Where shares are small, the next one's memory is asked for as a whole."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_case_no_worse("cpu", case, torch.float32)
    finally:
        torch.set_num_threads(before)


@over_cases()
def test_float64_is_computed_in_float64(backend, case):
    """No wider truth exists here. 1e-12 of the largest entry is far above the rounding of these sums in any
    order, and a hundred thousand times below what a detour through float32 leaves."""
    inputs = make_inputs(case, torch.float64, device_of(backend))
    with poisoned_memory():
        actual = with_gradients(partial(run, backend=backend), case, inputs)
    for name, truth in truth_of(case, inputs).items():
        assert actual[name].dtype == torch.float64
        scale = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
        assert torch.allclose(actual[name].cpu(), truth, rtol=0, atol=1e-12 * scale), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_cases([find_case("shift_partial"), find_case("gelu_tanh_norm"), find_case("matrix_grouped")])
def test_wide_parameters_with_half_inputs(backend, case, dtype):
    """As under autocast: float32 parameters are used as they are, and get float32 gradients."""
    skip_if_interpreter_lacks(backend, dtype)
    for name, value in assert_case_no_worse(backend, case, dtype, torch.float32)[0].items():
        assert value.dtype == (dtype if name in ("z", "dx") else torch.float32), name


@over_cases([find_case(name) for name in ("sgu", "matrix_shared", "shift_partial", "line")])
def test_each_gradient_alone(backend, case):
    """A gradient asked for alone is the one that comes with all the others, bit for bit."""
    inputs = make_inputs(case, torch.float32, device_of(backend))
    together = with_gradients(partial(run, backend=backend), case, inputs)
    for name in ("x", *PARAMETERS):
        if inputs[name] is None:
            continue
        leaf = inputs[name].detach().requires_grad_()
        z = run(case, {**inputs, name: leaf}, backend)
        (gradient,) = torch.autograd.grad(z, leaf, inputs["dz"])
        assert torch.equal(gradient, together[f"d{name}"]), name


@over_cases([find_case("shift_partial"), find_case("many_windows"), find_case("sgu"), find_case("tiles")])
def test_same_input_same_bits(backend, case):
    """Gradients too, and with any number of threads: sums are kept in a fixed order."""
    inputs = make_inputs(case, torch.float32, device_of(backend))
    threads, results = torch.get_num_threads(), []
    # The reference's sums are PyTorch's, which split by thread; a GPU's threads are not the host's.
    counts = (1, 2, 3, 2) if backend == "cpu" else (threads, threads)
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(with_gradients(partial(run, backend=backend), case, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@over_backends(interpreter=False)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 13, 14, 15, 16, 17, 47, 48, 49])
def test_sizes_around_tile_edges(backend, tokens, dtype):
    """Every remainder of a tile of rows, with channels on both sides of every vector and panel."""
    widths = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 95, 96, 97)
    if slow_to_start(backend):
        if tokens not in (1, 7, 16, 17, 49):
            pytest.skip("each size would be compiled; Triton's tiles have their edges at powers of two")
        widths = (5, 24, 33)
    for channels in widths:
        # The second window is partial, with one token; the table is learned, so that no weight is negligible.
        case = replace(find_case("line"), map=(tokens + 1,), window=(tokens,), channels=2 * channels)
        case = replace(case, softmax=False, table="learned")
        inputs = make_inputs(case, dtype, device_of(backend))
        with poisoned_memory():
            actual = with_gradients(partial(run, backend=backend), case, inputs)
        for name, truth in truth_of(case, inputs).items():
            tolerance = 64 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
            error = (actual[name].cpu().double() - truth).abs().max().item()
            assert error <= tolerance, f"{name} with {channels} channels in a group: {error:.3e}"


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("kind", ["sharp", "wide", "far", "noise"])
def test_what_the_cpu_leaves_out_of_a_row(dtype, kind):
    """In P and in its transpose: far weights, which sum to no more of their row than rounding takes.

    Of Gaussians, some of whose rows see but the far end of them, and of tables without order, of which some
    rows have far more to leave out than others. A weight may be the difference of two others in twin rows
    of tokens (csrc/pos_gate/cpu_packing.h): it is as exact as the larger one of its own and its twin's.
    """
    center = torch.tensor([[0.0, 0.0], [2.3, -1.4]], dtype=torch.float64) + 4 * (kind == "far")
    sharpness = {"sharp": 1.0, "wide": 0.5, "far": 0.9}.get(kind)
    factor = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.2, 0.4], [0.0, 0.7]]], dtype=torch.float64)
    if sharpness:
        table = gqpe_table(center, sharpness * factor, (14, 14), backend="reference").float()
    else:
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(2, 27, 27, generator=generator) * torch.tensor([4.0, 9.0]).view(2, 1, 1)
    tokens = 20 * 14  # a whole window, and one of 6 x 14 tokens
    identity = torch.eye(tokens, dtype=dtype).view(1, 20, 14, tokens).repeat(1, 1, 1, 2)  # in both groups
    x = torch.cat([identity, torch.ones_like(identity)], -1).requires_grad_()
    z = pos_gate(
        x, table.to(torch.promote_types(dtype, torch.float32)), window=14, softmax=True, backend="cpu"
    )
    (dx,) = torch.autograd.grad(z, x, identity)
    truth = pos_gate(x.detach().double(), table.double(), window=14, softmax=True, backend="reference")
    by_rows, by_columns, truth = (
        maps.detach().double().view(tokens, 2, tokens).transpose(0, 1)
        for maps in (z, dx[..., : 2 * tokens], truth)
    )
    info = torch.finfo(dtype)
    negligible = info.eps / (8 if dtype.itemsize == 2 else 2)
    twins = truth.view(2, tokens, 10, 2, 14).flip(3).view_as(truth)
    close = 16 * info.eps * torch.maximum(truth, twins) + info.eps * info.smallest_normal
    for packed in (by_rows, by_columns.transpose(1, 2)):
        left_out = (packed == 0) & (truth > 0)
        assert left_out.sum() > 0.2 * (truth > 0).sum() or kind != "sharp" or dtype == torch.float64
        assert (truth * left_out).sum(-1).max() <= negligible * (1 + 1e-5)
        assert (((packed - truth).abs() <= close) | left_out).all()
        if dtype != torch.float64:  # as exact as the truth itself
            assert (packed - truth).abs().sum(-1).max() <= negligible + 2 * info.eps


@over_backends()
def test_batches_do_not_mix(backend):
    """One image gives the same bits alone and in a batch."""
    case = find_case("shift_partial")
    inputs = make_inputs(case, torch.float32, device_of(backend))
    whole = run(case, inputs, backend)
    alone = run(case, {**inputs, "x": inputs["x"][1:]}, backend)
    exact = backend != "reference" and not interpreted(backend)  # else a library's product decides
    assert torch.allclose(whole[1:], alone, rtol=0, atol=0 if exact else 1e-6)


@over_backends()
def test_empty_maps(backend):
    """No tokens: an empty output, and zeros as gradients."""
    x = torch.randn(2, 0, 4, 8, device=device_of(backend), requires_grad=True)
    table = torch.randn(2, 5, 5, device=x.device, requires_grad=True)
    z = pos_gate(x, table, window=3, softmax=True, backend=backend)
    assert z.shape == (2, 0, 4, 4)
    z.sum().backward()
    assert x.grad.shape == x.shape and not table.grad.any()


@over_backends()
def test_far_centres_stay_finite(backend):
    """Centres hundreds of tokens away: without each row's own maximum the softmax is 0 / 0."""
    case = find_case("far_centres")
    inputs = make_inputs(case, torch.float32, device_of(backend))
    table = inputs["table"] * 1000
    result = with_gradients(partial(run, backend=backend), case, {**inputs, "table": table})
    assert all(t.isfinite().all() for t in result.values())


@over_backends()
def test_nan_stays_in_its_window_and_group(backend):
    """A NaN reaches the tokens of its window that it is mixed into, and no others."""
    case = find_case("tiles")
    inputs = make_inputs(case, torch.float32, device_of(backend))
    clean = run(case, inputs, backend)
    x = inputs["x"].clone()
    x[0, 1, 2, 3] = torch.nan  # in the first window of the first image
    z = run(case, {**inputs, "x": x}, backend)
    touched = torch.zeros_like(z, dtype=torch.bool)
    touched[0, :4, :4, 3] = True
    assert z[touched].isnan().all()
    assert torch.equal(z[~touched], clean[~touched])


def test_the_measure_fails_wrong_results():
    """The yardstick itself: NaN, an error of three times eager's, a wrong dtype or shape do not pass."""
    truth = torch.linspace(-1, 1, 9, dtype=torch.float64)
    eager = truth + 1e-3
    assert_no_worse(truth + 2e-3 - 1e-9, eager, truth)
    assert_no_worse(truth.float(), truth.float(), truth)
    assert_no_worse([truth + 3e-3, truth], [eager, eager], [truth, truth])
    for wrong in (truth + 3e-3, truth * torch.nan, truth.float(), truth[:5]):
        with pytest.raises(AssertionError):
            assert_no_worse(wrong, eager, truth)
    with pytest.raises(AssertionError):
        assert_no_worse({"z": truth}, {"z": truth, "dx": truth}, {"z": truth, "dx": truth})
    for wrong in ([truth + 3e-3] * 2, [truth, truth * torch.nan], [truth], [truth, truth[:5]]):
        with pytest.raises((AssertionError, ValueError)):
            assert_no_worse(wrong, [eager] * 2, [truth] * 2)
        with pytest.raises((AssertionError, ValueError)):
            assert_no_worse([{"z": t} for t in wrong], [{"z": eager}] * 2, [{"z": truth}] * 2)


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 7, 24, 33])
def test_what_a_cpu_call_leaves_behind_does_not_show_in_the_next(dtype, channels):
    """The kernels keep their workspace: a wide problem fills it with NaN before narrow ones."""
    gate = partial(pos_gate, softmax=True, activation="gelu", backend="cpu")
    x, table = torch.randn(1, 3, 3, 2 * channels, dtype=dtype), torch.randn(1, 5, 5)
    wanted = gate(x, table, window=3)
    gate(torch.full((8, 14, 14, 128), torch.nan, dtype=dtype), torch.randn(1, 27, 27), window=14)
    assert wanted.isfinite().all() and torch.equal(gate(x, table, window=3), wanted)


def test_poison_reaches_new_memory():
    with poisoned_memory():
        assert torch.empty(7).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_case_has_a_reason_and_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(len(case.why.split()) > 2 for case in CASES)
    assert {case.name for case in CASES} >= SAMPLE


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@over_backends()
def test_activations_from_tail_to_tail(backend, activation):
    """Values and slopes no worse than eager's, and nothing left of what is far below zero."""
    x2 = torch.linspace(-12, 12, 301 if interpreted(backend) else 50001, device=device_of(backend))
    far = torch.tensor([-1e30, -100.0, 100.0, 1e30], device=x2.device)

    def gated(values):  # windows of one token: P = 1, and act(X1) = act(0) = 0, so that Z = b * act(X2)
        x = torch.stack([torch.zeros_like(values), values], -1).unsqueeze(0)
        table, one = torch.zeros(1, 1, device=x2.device), torch.ones(1, device=x2.device)
        return pos_gate(
            x, table, one, window=(1,), softmax=True, activation=activation, backend=backend
        ).flatten()

    def eager(values):
        return torch.nn.functional.gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")

    def value_and_slope(function, values):
        values = values.detach().requires_grad_()
        y = function(values)
        return {"value": y.detach(), "slope": torch.autograd.grad(y.sum(), values)[0]}

    truth = value_and_slope(eager, x2.double().cpu())
    assert_no_worse(value_and_slope(gated, x2), value_and_slope(eager, x2), truth)
    assert torch.equal(gated(far).cpu(), torch.tensor([0.0, 0.0, 100.0, 1e30]))


@over_backends(without=["cuda", "triton"])
def test_small_tokens_far_from_the_table_s_maximum(backend):
    """Queries whose keys all weigh 1e-17 of the table's maximum, and tokens of 1e-21: neither may vanish."""
    table = gqpe_table(torch.tensor([[9.0]]), torch.ones(1, 1, 1), 14)
    x = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(0))
    x[..., :16] *= 2.0**-70
    expected = pos_gate(x.double(), table.double(), window=14, softmax=True, backend="reference")
    actual = pos_gate(x, table, window=14, softmax=True, backend=backend).double()
    assert ((actual - expected).abs() <= 1e-4 * expected.abs().amax(0)).all()
