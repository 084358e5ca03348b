"""The ops as torch.library sees them, and what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import available, device_of, interpreted, over_backends

from posmlp_kernels.pos_gate import ops
from posmlp_kernels.problem import check
from posmlp_kernels.testing import PARAMETERS, find_case, make_inputs, run

CASES = [
    find_case(name) for name in ("shift_partial", "matrix_grouped", "sgu", "gelu_tanh_norm", "empty_batch")
]
registered = over_backends(without=["reference"])


def op_arguments(case, backend, dtype=torch.float32):
    """The arguments of both ops, with x and dz dense but permuted: sliced ones would hide stride errors."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs(case, dtype, device_of(backend), parameter_dtype=wide)
    norm = (inputs["norm_weight"], inputs["norm_bias"], 1e-5) if case.norm else None
    x, dz = (inputs[name].movedim(-1, 1).contiguous().movedim(1, -1) for name in ("x", "dz"))
    problem = check(x, inputs["table"], inputs["bias"], inputs["matrix"], norm, **case.settings)
    forward = (x, *(inputs[name] for name in PARAMETERS), *ops.settings_of(problem))
    return forward, dz


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@registered
def test_opcheck(backend, case, dtype):
    """Schema (nothing mutated, nothing aliased), fake kernel (shapes, strides, dtypes), AOT dispatch."""
    if interpreted(backend):
        if dtype != torch.float32 or case.name != "gelu_tanh_norm":
            pytest.skip("interpreted Triton is slow; its fakes are the same for each dtype and case")
        case = replace(case, map=(3, 4), window=(3, 2), channels=4, shift=(1, 0))
    forward_op, backward_op = ops.overloads(backend)
    arguments, dz = op_arguments(case, backend, dtype)
    torch.library.opcheck(forward_op, arguments)
    for mixing_grad in (True, False):
        torch.library.opcheck(backward_op, (dz, *arguments, mixing_grad))


@registered
def test_fake_outputs_have_the_real_ones_metadata(backend):
    """Shape, dtype and strides, compared here because not every torch's opcheck sees a wrong stride."""
    small = replace(find_case("gelu_tanh_norm"), map=(3, 4), window=(3, 2), channels=4, shift=(1, 0))
    for case in [small] if interpreted(backend) else CASES:
        arguments, dz = op_arguments(case, backend, torch.float16)
        forward_op, backward_op = ops.overloads(backend)
        for op, args in ((forward_op, arguments), (backward_op, (dz, *arguments, True))):
            real = op(*args)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
            pairs = [(real, fake)] if isinstance(real, torch.Tensor) else zip(real, fake, strict=True)
            for r, f in pairs:
                assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)
                assert r.is_contiguous()


@registered
def test_schemas_are_the_one_schema(backend):
    for op, schema in zip(ops.overloads(backend), (ops.FORWARD_SCHEMA, ops.BACKWARD_SCHEMA), strict=True):
        packet = op._schema.name
        assert str(op._schema) == str(torch._C.parse_schema(f"{packet}.{backend}{schema}"))


@pytest.mark.parametrize("case", CASES[:4], ids=lambda c: c.name)
@registered
def test_backward_keeps_the_inputs_only(backend, case):
    """No activation, no mixing matrix and no copy of x: what autograd keeps is what came in."""
    inputs = make_inputs(case, device=device_of(backend))
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if t is not None and n != "dz"}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(case, {**inputs, **leaves}, backend)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves.values()}
    assert len(kept) == len(leaves)


@over_backends(without=["reference"], interpreter=False)
def test_half_inputs_are_kept_as_they_are(backend):
    """x is not widened to keep it; only small parameters are."""
    case = find_case("tiles")
    inputs = make_inputs(case, torch.bfloat16, device_of(backend))
    x, kept = inputs["x"].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(case, {**inputs, "x": x, "table": inputs["table"].requires_grad_()}, backend)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@registered
def test_no_graph_without_gradients(backend):
    case = find_case("tiles")
    inputs = make_inputs(case, device=device_of(backend))
    x = inputs["x"].requires_grad_()
    with torch.no_grad():
        assert run(case, {**inputs, "x": x}, backend).grad_fn is None
    assert not run(case, {**inputs, "x": x.detach()}, backend).requires_grad
    z = run(case, {**inputs, "x": x}, backend)
    z.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_every_available_back_end_but_the_reference_is_registered():
    for backend in ("cuda", "triton", "cpu"):
        if available(backend):
            assert len(ops.overloads(backend)) == 2
