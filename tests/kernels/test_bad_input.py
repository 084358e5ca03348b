"""Bad input, one thing at a time: the message names the argument, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

from posmlp_kernels import explain, pos_gate

NAN = float("nan")


def good(**changes):
    """Legal arguments: a 6 x 8 map in 3 x 4 windows, C = 12, S = 2; then the one change."""
    torch.manual_seed(0)
    arguments = {
        "x": torch.randn(2, 6, 8, 24),
        "table": torch.randn(2, 5, 7),
        "bias": torch.randn(12),
        "window": (3, 4),
        "softmax": True,
        "matrix": torch.randn(12, 12),
        "shift": (1, 2),
        "activation": "gelu",
        "norm": (torch.ones(12), torch.zeros(12), 1e-5),
        "backend": "reference",
    }
    return arguments | changes


def test_the_good_arguments_are_good():
    assert pos_gate(**good()).shape == (2, 6, 8, 12)
    assert pos_gate(**good(shift=None, norm=None, matrix=None, bias=None)).shape == (2, 6, 8, 12)
    assert pos_gate(**good(norm=(None, None, 1))).shape == (2, 6, 8, 12)


ones = torch.ones
FLOATS = "x must be float64, float32, bfloat16 or float16, got "
A_MAP = "x must be [B, *map, 2C] with a map of one dimension or more, got "
EVEN = "x must have an even number of channels, [X1 | X2], got "
WINDOW = "window must be an int or 2 ints, one per map dimension, got "
SHIFT = "shift must be an int or 2 ints, one per map dimension, got "
ACTIVATION = "activation must be one of none, gelu, gelu_tanh, got "
TABLE = "table must be [S, 2*3-1, 2*4-1] = [S, 5, 7], got "
MATRIX = "matrix must be [N, N] or [S, N, N] with N = 12, got "
DIVIDES = " must have a number of groups that divides C = 12 channels, got S = "
EPS = "norm eps must be a finite number of at least 0, got "

# (the start of the message, the change and the rest of the message, ...), by the error's type.
TYPE_ERRORS = [
    ("x must be a Tensor, got ", ({"x": [1.0]}, "list")),
    (
        FLOATS,
        ({"x": ones(2, 6, 8, 24, dtype=torch.int64)}, "int64"),
        ({"x": ones(2, 6, 8, 24, dtype=torch.complex64)}, "complex64"),
        ({"x": ones(2, 6, 8, 24, dtype=torch.bool)}, "bool"),
    ),
    ("softmax must be a bool, got ", ({"softmax": 1}, "1"), ({"softmax": None}, "None")),
    ("table must be a Tensor or None, got ", ({"table": [[1.0]]}, "list")),
    ("matrix must be a Tensor or None, got ", ({"matrix": 1}, "int")),
    ("bias must be a Tensor or None, got ", ({"bias": 0.0}, "float")),
    ("norm must be (weight, bias, eps), got ", ({"norm": True}, "True"), ({"norm": (None, 1e-5)}, "(None")),
    ("norm weight must be a Tensor or None, got ", ({"norm": (1.0, None, 1e-5)}, "float")),
]
VALUE_ERRORS = [
    (A_MAP, ({"x": ones(2, 24)}, "[2, 24]"), ({"x": torch.tensor(1.0)}, "[]")),
    (EVEN, ({"x": ones(2, 6, 8, 23)}, "23"), ({"x": ones(2, 6, 8, 0)}, "0")),
    ("window must be an int or 3 ints", ({"x": ones(2, 3, 6, 8, 24)}, ", one per map dimension, got (3, 4)")),
    (
        "window must be at least 1 in every dimension, got ",
        ({"window": (3, 0)}, "[3, 0]"),
        ({"window": -1}, "[-1"),
    ),
    (
        WINDOW,
        ({"window": (3,)}, "(3,)"),
        ({"window": (3, True)}, "(3, True)"),
        ({"window": True}, "True"),
        ({"window": (3.0, 4)}, "(3.0, 4)"),
        ({"window": 3.0}, "3.0"),
        ({"window": None}, "None"),
        ({"window": "34"}, "'34'"),
    ),
    (
        SHIFT,
        ({"shift": (1, 2, 3)}, "(1, 2, 3)"),
        ({"shift": 0.5}, "0.5"),
        ({"shift": (True, 1)}, "(True, 1)"),
        ({"shift": False}, "False"),
    ),
    (ACTIVATION, ({"activation": "relu"}, "'relu'"), ({"activation": None}, "None")),
    ("backend must be one of cuda, triton, cpu, reference, got ", ({"backend": "gpu"}, "'gpu'")),
    ("table or matrix must be given, got None for both", ({"table": None, "matrix": None}, "")),
    (
        TABLE,
        ({"table": ones(2, 5, 5)}, "[2, 5, 5]"),
        ({"table": ones(5, 7)}, "[5, 7]"),
        ({"table": ones(0, 5, 7)}, "[0, 5, 7]"),
    ),
    ("table" + DIVIDES, ({"table": ones(5, 5, 7)}, "5")),
    ("matrix" + DIVIDES, ({"table": None, "matrix": ones(5, 12, 12)}, "5")),
    (MATRIX, ({"matrix": ones(9, 9)}, "[9, 9]"), ({"matrix": ones(12)}, "[12]")),
    ("matrix must have the table's 2 groups, got ", ({"matrix": ones(3, 12, 12)}, "[3, 12, 12]")),
    (
        "matrix must have at least one group, got ",
        ({"table": None, "matrix": ones(0, 12, 12)}, "[0, 12, 12]"),
    ),
    ("bias must be [N] = [12], got ", ({"bias": ones(9)}, "[9]"), ({"bias": ones(2, 12)}, "[2, 12]")),
    ("norm weight must be [C] = [12], got ", ({"norm": (ones(24), None, 1e-5)}, "[24]")),
    ("norm bias must be [C] = [12], got ", ({"norm": (None, ones(24), 1e-5)}, "[24]")),
    (
        EPS,
        ({"norm": (None, None, -1e-5)}, "-1e-05"),
        ({"norm": (None, None, NAN)}, "nan"),
        ({"norm": (None, None, float("inf"))}, "inf"),
        ({"norm": (None, None, "1e-5")}, "'1e-5'"),
        ({"norm": (None, None, True)}, "True"),
    ),
]
REFUSED = [
    pytest.param(change, error, start + rest, id=f"{start.split(' must')[0]}={rest}")
    for error, groups in ((TypeError, TYPE_ERRORS), (ValueError, VALUE_ERRORS))
    for start, *changes in groups
    for change, rest in changes
]


@pytest.mark.parametrize("function", [pos_gate, explain], ids=lambda f: f.__name__)
@pytest.mark.parametrize("change, error, message", REFUSED)
def test_refused(change, error, message, function):
    with pytest.raises(error, match=re.escape(message)):
        function(**good(**change))


PARAMETERS = {
    "table": lambda t: {"table": t(2, 5, 7)},
    "bias": lambda t: {"bias": t(12)},
    "matrix": lambda t: {"matrix": t(12, 12)},
    "norm weight": lambda t: {"norm": (t(12), None, 1e-5)},
    "norm bias": lambda t: {"norm": (None, t(12), 1e-5)},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_dtype_mixes(name):
    """Parameters in x's dtype, or in float32 beside a half-precision x; nothing else is guessed at."""
    for x_dtype, dtype, wanted in (
        (torch.float32, torch.float64, "float32"),
        (torch.float32, torch.bfloat16, "float32"),
        (torch.float32, torch.int64, "float32"),
        (torch.float64, torch.float32, "float64"),
        (torch.bfloat16, torch.float16, "bfloat16 or float32"),
        (torch.float16, torch.float64, "float16 or float32"),
    ):
        others = {"table": torch.ones(2, 5, 7, dtype=x_dtype), "bias": None, "matrix": None, "norm": None}
        change = others | PARAMETERS[name](lambda *s, d=dtype: torch.ones(s, dtype=d))
        came = str(dtype).removeprefix("torch.")
        message = f"{name} must be {wanted} where x is {str(x_dtype).removeprefix('torch.')}, got {came}"
        with pytest.raises(TypeError, match=re.escape(message)):
            pos_gate(**good(x=torch.ones(2, 6, 8, 24, dtype=x_dtype), **change))


@pytest.mark.parametrize("name", PARAMETERS)
def test_device_mixes(name):
    change = PARAMETERS[name](lambda *s: torch.ones(s, device="meta"))
    with pytest.raises(ValueError, match=f"{name} must be on x's device cpu, got meta"):
        pos_gate(**good(**change))


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_anomaly_mode_finds_poisoned_parameters(name, value):
    """On request only: looking costs a pass over the parameters and a wait for the device."""
    change = PARAMETERS[name](lambda *s: torch.full(s, value))
    pos_gate(**good(**change))
    with (
        torch.autograd.detect_anomaly(check_nan=False),
        pytest.raises(ValueError, match=rf"{name} must be finite, got \d+ values that are not"),
    ):
        pos_gate(**good(**change))


def test_settings_are_by_name_only():
    """`softmax` and `window` have no defaults to be wrong about, and no place in a row of positions."""
    x, table = torch.ones(1, 4, 4, 2), torch.ones(1, 3, 3)
    for call in (
        lambda: pos_gate(x, table, window=2),
        lambda: pos_gate(x, table, softmax=True),
        lambda: pos_gate(x, table, None, 2, True),
        lambda: pos_gate(x, table, window=2, softmax=True, windows=2),
    ):
        with pytest.raises(TypeError):
            call()
