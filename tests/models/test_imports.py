"""Importing posmlp needs torch alone, and costs no import of timm."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_timm_and_safetensors():
    blocked = "import sys\nfor m in ('timm', 'safetensors', 'torchvision', 'triton'): sys.modules[m] = None\n"
    run(
        blocked + "import torch, posmlp\n"
        "posmlp.create_model('posmlp_nano').eval()(torch.randn(1, 3, 32, 32))\n"
        "assert posmlp.complexity(posmlp.create_model('posmlp_nano'), 32)"
    )


def test_timm_is_not_imported_for_posmlp():
    run("import sys, posmlp; assert 'timm' not in sys.modules and 'safetensors' not in sys.modules")


@pytest.mark.parametrize(
    "order", ["import posmlp, timm", "import timm, posmlp", "import posmlp, timm.layers"]
)
def test_registration_in_any_order(order):
    pytest.importorskip("timm")
    run(f"{order}; import timm; assert timm.is_model('posmlp_tiny_lrpe') and timm.is_model('gmlp_s16_sgu')")
