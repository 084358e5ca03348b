"""`PosSGU`: shapes, encodings, initial values, state dict, copies, a training step, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from support import available, over_backends

from posmlp_kernels import PosSGU, explain, gqpe_table, mixing_matrix, pos_gate, use_backend
from posmlp_kernels.encodings import gqpe_isotropic_table
from posmlp_kernels.layers import ENCODINGS

ROOT = Path(__file__).resolve().parents[2]
STATE = {
    "gqpe": {"center": (2, 2), "factor": (2, 2, 2), "bias": (12,)},
    "gqpe_isotropic": {"center": (2, 2), "scale": (2,), "bias": (12,)},
    "lrpe": {"table": (2, 5, 7), "bias": (12,)},
    "lrpe_m": {"table": (2, 5, 7), "matrix": (12, 12), "bias": (12,)},
    "sgu": {"matrix": (12, 12), "bias": (12,), "norm.weight": (8,), "norm.bias": (8,)},
}
encodings = pytest.mark.parametrize("encoding", ENCODINGS)


def make(encoding="gqpe", **options):
    torch.manual_seed(0)
    return PosSGU(16, (3, 4), encoding=encoding, **{"groups": 2, "backend": "reference"} | options)


def perturbed(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return layer


def test_every_encoding_is_covered_here():
    assert set(STATE) == set(ENCODINGS)


@encodings
@over_backends(without=["cuda", "triton"])
def test_layer_is_the_operator(backend, encoding):
    """The layer adds nothing to `pos_gate` but its parameters."""
    options = {"shift": (1, 2), "activation": "gelu", "norm": True, "backend": backend}
    layer = perturbed(make(encoding, **options))
    x = torch.randn(2, 5, 7, 16)
    table = {
        "gqpe": lambda: gqpe_table(layer.center, layer.factor, (3, 4), backend=backend),
        "gqpe_isotropic": lambda: gqpe_isotropic_table(layer.center, layer.scale, (3, 4), backend=backend),
        "sgu": lambda: None,
    }.get(encoding, lambda: layer.table)()
    expected = pos_gate(
        x,
        table,
        layer.bias,
        window=(3, 4),
        softmax=encoding.startswith("gqpe"),
        matrix=layer.matrix,
        shift=(1, 2),
        activation="gelu",
        norm=(layer.norm.weight, layer.norm.bias, layer.norm.eps),
        backend=backend,
    )
    assert torch.equal(layer(x), expected)
    assert expected.shape == (2, 5, 7, 8)


@encodings
def test_tokens_of_one_window(encoding):
    """[B, N, dim] is one window, row by row."""
    layer = perturbed(make(encoding))
    x = torch.randn(3, 3, 4, 16)
    assert torch.equal(layer(x.flatten(1, 2)), layer(x).flatten(1, 2))


def test_one_dimensional_windows_take_sequences():
    layer = PosSGU(8, (5,), groups=2, backend="reference")
    assert layer(torch.randn(2, 13, 8)).shape == (2, 13, 4)
    assert layer.center.shape == (2, 1)


def test_three_dimensions():
    layer = PosSGU(8, (2, 3, 2), groups=2, backend="reference")
    assert layer(torch.randn(2, 3, 4, 5, 8)).shape == (2, 3, 4, 5, 4)
    assert layer(torch.randn(2, 12, 8)).shape == (2, 12, 4)


@encodings
def test_state_dict_names_and_shapes_are_stable(encoding):
    """These names are in people's checkpoints: the cache and the window add none."""
    layer = make(encoding).eval()
    layer(torch.randn(1, 3, 4, 16))
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == STATE[encoding]
    assert not list(layer.buffers())
    no_bias = make(encoding, bias=False)
    assert set(no_bias.state_dict()) == set(STATE[encoding]) - {"bias"}


@encodings
def test_every_parameter_learns(encoding):
    layer = perturbed(make(encoding))
    layer(torch.randn(2, 5, 7, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_initial_values():
    """Centres and factors about 0 and the identity, std 1e-2; LRPE truncated normal, std 0.02; W 1e-6."""
    torch.manual_seed(0)
    layer = PosSGU(2048, 5, groups=1024)
    assert abs(layer.center.std() - 1e-2) < 1e-3 and abs(layer.center.mean()) < 1e-3
    noise = layer.factor - torch.eye(2)
    assert abs(noise.std() - 1e-2) < 1e-3 and abs(noise.mean()) < 1e-3
    assert not layer.bias.any()
    scale = PosSGU(2048, 5, groups=1024, encoding="gqpe_isotropic").scale
    assert abs(scale.mean() - 1) < 2e-3 and abs(scale.std() - 1e-2) < 1e-3
    table = PosSGU(64, 5, groups=32, encoding="lrpe").table
    assert abs(table.std() - 0.02) < 2e-3 and table.abs().max() <= 2
    free = PosSGU(16, 14, encoding="lrpe_m")
    assert abs(free.matrix.std() - 1e-6) < 1e-7
    gate = PosSGU(16, 14, encoding="sgu")
    assert abs(gate.matrix.std() - 1e-6) < 1e-7 and (gate.bias == 1).all()
    assert (gate.norm.weight == 1).all() and not gate.norm.bias.any()


@encodings
def test_reset_parameters_starts_again(encoding):
    """As after construction on the meta device, for the same seed; under timm's name too."""
    layer = perturbed(make(encoding, norm=True))
    expected = make(encoding, norm=True).state_dict()
    for reset in (layer.reset_parameters, layer.init_weights):
        perturbed(layer)
        torch.manual_seed(0)
        reset()
        assert all(torch.equal(v, expected[k]) for k, v in layer.state_dict().items())


def test_a_new_sgu_lets_everything_through():
    """gMLP starts as the identity on the gating half: W near 0, bias 1."""
    x = torch.randn(2, 3, 4, 16)
    torch.testing.assert_close(make("sgu")(x), x[..., 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "device, dtype", [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)]
)
@encodings
def test_device_and_dtype(encoding, device, dtype):
    layer = make(encoding, device=device, dtype=dtype, norm=True)
    assert all(p.device.type == device and p.dtype == dtype for p in layer.parameters())
    z = layer(torch.ones(1, 3, 4, 16, device=device, dtype=dtype))
    assert z.shape == (1, 3, 4, 8) and z.dtype == dtype and z.device.type == device


@encodings
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_are_independent(encoding, duplicate):
    layer = perturbed(make(encoding, shift=1, norm=True, activation="gelu")).eval()
    x = torch.randn(2, 5, 7, 16)
    with torch.no_grad():
        expected = layer(x)
    if duplicate == "deepcopy":
        copied = copy.deepcopy(layer)
    elif duplicate == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    elif duplicate == "save":
        torch.save(layer, buffer := io.BytesIO())
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = make(encoding, shift=1, norm=True, activation="gelu").eval()
        copied.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(copied(x), expected)
        for parameter in copied.parameters():
            parameter.add_(0.5)
        assert not torch.equal(copied(x), expected)
        assert torch.equal(layer(x), expected)


@encodings
@over_backends(without=["cuda", "triton"])
def test_training_lowers_the_loss(backend, encoding):
    layer = perturbed(make(encoding, backend=backend))
    target = perturbed(make(encoding, backend=backend)).requires_grad_(False)
    x = torch.randn(4, 6, 8, 16)
    perturbed(target)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


@over_backends(without=["cuda", "triton"])
def test_distributed_data_parallel(backend, tmp_path):
    """Two processes with half of a batch each: hooks fire for every parameter, and gradients are averaged."""
    command = [sys.executable, str(Path(__file__).with_name("ddp_gradients.py")), backend]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, **pipes)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


def test_layer_in_a_gated_mlp():
    """The constructor order of timm's `gate_layer`: the width is the only positional argument it gets."""
    timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    gate = partial(PosSGU, window=4, groups=2, backend="reference")
    mlp = timm_layers.GatedMlp(8, 32, gate_layer=gate)
    assert mlp(torch.randn(2, 16, 8)).shape == (2, 16, 8)


def test_repr_says_what_it_is():
    text = repr(make("lrpe", shift=(1, 0), activation="gelu", bias=False))
    for part in ("16", "window=(3, 4)", "groups=2", "'lrpe'", "bias=False", "shift=(1, 0)", "'gelu'"):
        assert part in text


def test_mixing_matrix_of_a_layer_is_a_picture_of_it():
    layer = perturbed(make())
    matrix = mixing_matrix(layer.relative_table(), layer.window, layer.softmax)
    assert matrix.shape == (2, 12, 12)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 12))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dim": 15}, ValueError, "dim must be an even number of channels, [X1 | X2], got 15"),
        ({"dim": 0}, ValueError, "dim must be an even number of channels, [X1 | X2], got 0"),
        ({"dim": 16.0}, ValueError, "dim must be an even number of channels, [X1 | X2], got 16.0"),
        ({"window": 0}, ValueError, "window must be at least 1 in every dimension, got [0, 0]"),
        (
            {"window": (3, 2.5)},
            ValueError,
            "window must be an int or 2 ints, one per map dimension, got (3, 2.5)",
        ),
        ({"window": ()}, ValueError, "window must be at least 1 in every dimension, got []"),
        ({"window": None}, ValueError, "window must be an int or 2 ints, one per map dimension, got None"),
        ({"shift": (1,)}, ValueError, "shift must be an int or 2 ints, one per map dimension, got (1,)"),
        ({"groups": 3}, ValueError, "groups must divide the C = dim / 2 = 8 channels, got 3"),
        ({"groups": 0}, ValueError, "groups must be a positive int, got 0"),
        ({"groups": True}, ValueError, "groups must be a positive int, got True"),
        ({"encoding": "rope"}, ValueError, "encoding must be one of gqpe, gqpe_isotropic, lrpe, lrpe_m, sgu"),
        ({"activation": "relu"}, ValueError, "activation must be one of none, gelu, gelu_tanh, got 'relu'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of cuda, triton, cpu, reference, got 'gpu'"),
        ({"windows": 3}, TypeError, "windows"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        PosSGU(**{"dim": 16, "window": 3, "groups": 2} | arguments)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 3, 4, 15), "x must be [B, *map, 16], got [2, 3, 4, 15]"),
        ((16,), "x must be [B, *map, 16], got [16]"),
        ((2, 13, 16), "x as tokens must be [B, 12, 16], got [2, 13, 16]"),
        ((2, 3, 3, 4, 16), "window must be an int or 3 ints"),
        ((2, 16), "x must be"),
    ],
    ids=str,
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()(torch.ones(shape))


def test_default_groups_and_window():
    layer = PosSGU(32, 4)
    assert layer.groups == 8 and layer.window == (4, 4) and layer.encoding == "gqpe"
    assert math.prod(layer.bias.shape) == 16


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize("asked", [None, "cpu", "reference"])
@pytest.mark.parametrize("around", [None, "cpu", "reference"])
def test_runs_compiled_where_the_choice_would_be_the_cpu(asked, around):
    x, gate = torch.randn(2, 5, 6, 16), PosSGU(16, 4, groups=2, backend=asked)
    with use_backend(around):
        chosen = explain(x, **gate.gate_arguments())
        assert gate.runs_compiled() == any(re.match(r"cpu .*<- runs", line) for line in chosen.splitlines())
    assert not PosSGU(16, 4, groups=2, norm=True).runs_compiled()


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e != "sgu"])
@pytest.mark.parametrize("shift", [0, (-1, 7)])
def test_run_compiled_is_forward(encoding, shift):
    gate = PosSGU(16, 4, groups=2, encoding=encoding, shift=shift, activation="gelu").eval()
    x = torch.randn(2, 5, 6, 16)
    with torch.no_grad():
        by_the_front_door = pos_gate(x, **gate.gate_arguments())
        assert torch.equal(gate.run_compiled(x, gate.relative_table()), by_the_front_door)
        assert torch.equal(gate(x), by_the_front_door)


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
def test_training_by_the_ops_is_training_by_the_functions():
    gate, x = PosSGU(16, 4, groups=2, shift=1).train(), torch.randn(2, 5, 6, 16, requires_grad=True)
    leaves = (x, gate.center, gate.factor, gate.bias)
    table = gqpe_table(gate.center, gate.factor, gate.window)
    by_functions = pos_gate(x, table, gate.bias, window=4, softmax=True, shift=1)
    z = gate(x)
    assert torch.equal(z, by_functions)
    for got, expected in zip(
        torch.autograd.grad(z.square().sum(), leaves),
        torch.autograd.grad(by_functions.square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
def test_inference_raises_what_training_does():
    """Where a layer runs the compiled op at once, it is only because nothing can be wrong."""
    gate, x = PosSGU(16, 4, groups=2).eval(), torch.randn(2, 5, 6, 16)
    with torch.no_grad():
        with pytest.raises(TypeError, match="table must be"):
            PosSGU(16, 4, groups=2, dtype=torch.float64).eval()(x)
        with pytest.raises(TypeError, match="x must be float64, float32"):
            gate(x.int())
        with pytest.raises(ValueError, match="window must be an int or 3 ints"):
            gate(x[:, None])
        with pytest.raises(NotImplementedError, match="cuda"):
            PosSGU(16, 4, groups=2, backend="cuda").eval()(x)
        gate.bias.data[3] = torch.nan
        with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match="bias must be finite"):
            gate(x)
        space = PosSGU(16, (2, 2, 2, 2), groups=2).eval()  # more dimensions than the op takes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert space(torch.randn(1, 3, 2, 2, 2, 16)).shape == (1, 3, 2, 2, 2, 8)


def test_settings_may_be_set_anew_as_lists():
    layer, x = PosSGU(8, 3, groups=2).eval(), torch.randn(1, 6, 6, 8)
    shifted = PosSGU(8, 3, groups=2, shift=1).eval()
    shifted.load_state_dict(layer.state_dict())
    layer.window, layer.shift = [3, 3], [1, 1]
    with torch.no_grad():
        assert torch.equal(layer(x), shifted(x))
    assert torch.equal(layer.train()(x), shifted.train()(x))
