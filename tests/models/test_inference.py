"""Inference on a CPU: a few images at a time where hidden maps are large, and by four operations a block."""

import copy

import pytest
import torch
from torch import nn

from posmlp import blocks, create_model
from posmlp.blocks import Block
from posmlp_kernels import PosSGU, backends, use_backend


@pytest.fixture
def level():
    """One that takes maps `[B, 48, 6, 5]`, its hidden maps of 23040 bytes an image."""
    torch.manual_seed(0)
    return create_model("posmlp_nano", windows=4, shift=True).levels[0].eval()


@pytest.fixture
def x():
    return torch.randn(5, 48, 6, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batches(level, monkeypatch):
    """The sizes of the batches that go through the level's last block, two images at most in inference."""
    block = level.blocks[-1]
    assert 6 * 5 * block.gate.dim * 4 == 23040
    monkeypatch.setattr(blocks, "HIDDEN_BYTES", 2 * 23040 + 1)
    sizes, mixed, infer = [], block._mixed, block.infer
    monkeypatch.setattr(block, "_mixed", lambda x: sizes.append(len(x)) or mixed(x))
    monkeypatch.setattr(block, "infer", lambda x, table: sizes.append(len(x)) or infer(x, table=table))
    return sizes


@pytest.fixture
def operations(monkeypatch):
    """A list that grows with every block that runs as four operations."""
    calls, infer = [], Block.infer
    monkeypatch.setattr(
        Block, "infer", lambda block, *given, **more: calls.append(block) or infer(block, *given, **more)
    )
    return calls


needs_compiled = pytest.mark.skipif(
    "cpu" not in backends() or not blocks.pays(torch.float32), reason="no compiled back end, or no AVX-512"
)


def as_modules(level, x):
    """What the level's modules make of a map, one after the other."""
    x = level.downsample(x).permute(0, 2, 3, 1)
    return level.blocks(x).permute(0, 3, 1, 2)


def test_in_parts_as_in_one(level, x, batches):
    whole = level(x)
    with torch.inference_mode():
        parts = level(x)
    assert batches == [5, 2, 2, 1]
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(level(x), parts)


def test_an_image_that_is_larger_goes_alone(level, x, batches, monkeypatch):
    monkeypatch.setattr(blocks, "HIDDEN_BYTES", 1)
    with torch.no_grad():
        level(x)
    assert batches == [1] * 5


def test_what_fits_goes_in_one(level, x, batches):
    with torch.no_grad():
        level(x[:2])
        assert level(x[:0]).shape == (0, 48, 6, 5)
    assert batches == [2, 0]


def test_half_precision_fits_twice_as_many(level, x, batches):
    with torch.no_grad():
        assert level.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert batches == [4, 1]


def test_training_and_hooks_see_the_whole_batch(level, x, batches):
    level.train()
    with torch.no_grad():
        level(x)
    level.eval().blocks[0].gate.register_forward_hook(lambda module, inputs, z: batches.append(len(z)))
    with torch.no_grad():
        level(x)
    assert batches == [5, 5, 5]


def test_parts_that_others_put_there_see_the_whole_batch(level, x, batches):
    level.blocks.insert(0, torch.nn.Softmax(0))
    with torch.no_grad():
        level(x)
    assert batches == [5]


def test_dropout_that_stays_on_sees_the_whole_batch(level, x, batches):
    level.blocks[0].drop.train()
    with torch.no_grad():
        level(x)
    assert batches == [5]


def test_whoever_looks_into_it_sees_the_whole_batch(level, x, batches):
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            level(x)
        torch.vmap(level)(x.unsqueeze(0))
        assert batches == [5, 5]
        exported = torch.export.export(level, (x,)).graph
        assert not [node for node in exported.nodes if "split" in str(node.target)]


@needs_compiled
@pytest.mark.parametrize("encoding", ["gqpe", "gqpe_isotropic", "lrpe", "lrpe_m"])
@pytest.mark.parametrize("bias", [True, False])
def test_four_operations_give_the_modules_bits(encoding, bias, x, operations):
    model = create_model("posmlp_nano", windows=4, shift=True, encoding=encoding, bias=bias).eval()
    for level in model.levels:
        with torch.no_grad():
            wanted = as_modules(level, x)
            assert torch.equal(level(x), wanted)
        x = wanted
    assert len(operations) == sum(model.depths)


@needs_compiled
@pytest.mark.parametrize(
    "change", ["hook", "global hook", "forward", "part", "float64", "backend", "grad", "anomaly"]
)
def test_whoever_looks_or_changes_something_meets_the_modules(level, x, operations, change):
    block, seen = level.blocks[0], []
    with torch.no_grad():
        wanted = as_modules(level, x)
    if change == "hook":
        block.norm.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    if change == "forward":  # as those do that load weights when they are wanted
        forward = block.fc2.forward
        block.fc2.forward = lambda *args, **more: seen.append(block.fc2) or forward(*args, **more)
    if change == "part":
        block.norm = nn.Sequential(block.norm)
    if change == "float64":
        level, x = level.double(), x.double()
    if change == "backend":
        block.gate.backend = "reference"
    if change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module))
    with torch.set_grad_enabled(change == "grad"), torch.autograd.set_detect_anomaly(change == "anomaly"):
        z = level(x)
    if change == "global hook":
        handle.remove()
    torch.testing.assert_close(z, wanted.to(z.dtype), rtol=1e-5, atol=1e-6)
    assert not operations and bool(seen) == (change in ("hook", "global hook", "forward"))


@needs_compiled
def test_a_back_end_that_is_asked_for_runs(level, x, operations):
    with torch.no_grad(), use_backend("reference"):
        level(x)
    assert not operations
    with torch.no_grad(), use_backend("cpu"):
        level(x)
    assert len(operations) == len(level.blocks)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_a_weight_that_does_not_fit_is_refused(level, x, part):
    linear = getattr(level.blocks[0], part)
    linear.weight = nn.Parameter(linear.weight[:, :-1])
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"shapes|size"):
        level(x)


@needs_compiled
@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("gate", "bias", "bias"),
        ("gate", "matrix", "matrix"),
        ("norm", "weight", "weight"),
        ("fc1", "bias", "size"),
        ("fc2", "bias", "size"),
    ],
)
@torch.no_grad()
def test_a_parameter_that_does_not_fit_is_named(level, x, part, name, message):
    level(x)
    setattr(getattr(level.blocks[0], part), name, nn.Parameter(torch.zeros(3, 2)))
    with pytest.raises((RuntimeError, ValueError), match=message):
        level(x)


@needs_compiled
@pytest.mark.parametrize("part", ["fc1", "fc2"])
@torch.no_grad()
def test_a_bias_that_is_broadcast_meets_the_modules(level, x, part, operations):
    linear = getattr(level.blocks[0], part)
    linear.bias = nn.Parameter(torch.tensor(0.5))
    z = level(x)
    linear.bias = nn.Parameter(torch.full((linear.out_features,), 0.5))
    torch.testing.assert_close(z, level(x))
    assert len(operations) == len(level.blocks)  # of the second call


@needs_compiled
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_weights_by_rows_give_the_modules_bits(level, x, rows, operations):
    for block in level.blocks:
        for linear in (block.fc1, block.fc2):
            linear.weight = nn.Parameter(linear.weight.contiguous())
    x = x.repeat(rows, 1, 1, 1)
    assert torch.equal(level(x), as_modules(level, x)) and len(operations) == len(level.blocks)


def table_in_place(gate):
    gate.center.data += 0.5


def table_parameters_replaced(gate):
    gate.center = nn.Parameter(gate.center + 0.5)


def table_parameters_moved(gate):
    gate.center.data = gate.center.data + 0.5


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("change", [table_in_place, table_parameters_replaced, table_parameters_moved])
@torch.no_grad()
def test_changed_parameters_count(level, x, change, place):
    before = level(x)
    change(level.blocks[place].gate)
    after = level(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, as_modules(level, x))


@needs_compiled
@torch.no_grad()
def test_a_gate_in_the_place_of_another_brings_its_table(level, x, operations):
    level(x)
    old = level.blocks[0].gate
    new = PosSGU(old.dim, 3, groups=old.groups, activation=old.activation, bias=False).eval()
    new.load_state_dict({k: v for k, v in old.state_dict().items() if k in new.state_dict()})
    level.blocks[0].gate = new
    torch.testing.assert_close(level(x), as_modules(level, x))
    level.blocks[0].gate = lrpe = PosSGU(old.dim, 3, groups=old.groups, encoding="lrpe").eval()
    level(x)
    lrpe.table = nn.Parameter(lrpe.table + 1)
    torch.testing.assert_close(level(x), as_modules(level, x))
    assert len(operations) == 4 * len(level.blocks)


@torch.no_grad()
def test_copies_do_not_share_tables(level, x):
    before = level(x)
    other = copy.deepcopy(level)
    assert other._tables._entry is None
    other.blocks[0].gate.center += 0.5
    assert not torch.allclose(other(x), before) and torch.equal(level(x), before)
