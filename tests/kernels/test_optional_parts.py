"""The package where something optional is missing: it imports, says what is absent, and is still right."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import available

import posmlp_kernels

ROOT = Path(__file__).resolve().parents[2]

BLOCK = '''
import sys

class Without:
    """A finder that does not find some modules, or finds them broken."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in BLOCKED and name not in BLOCKED:
            return self.finder.find_spec(name, path, target)
        if BROKEN:
            raise ImportError(f"{name} was built for something else", name=name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
'''
GATE = """
import warnings
warnings.simplefilter("ignore")
import torch, posmlp_kernels
from posmlp_kernels.testing import *
case = find_case("gelu_tanh_norm")
assert_gate_no_worse(run, case)
"""


def python(code, block=(), broken=False):
    """Run code in a new interpreter in which some modules cannot be imported; its output."""
    prelude = BLOCK.replace("BLOCKED", repr(tuple(block))).replace("BROKEN", repr(broken)) if block else ""
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_touches_nothing_optional():
    """Beyond what torch itself imports, only the standard library and this package; no thread, no GPU."""
    out = python("""
        import sys, threading, torch
        before = set(sys.modules)
        import posmlp_kernels
        new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
        print(threading.active_count(), torch.cuda.is_initialized(), *sorted(new))
    """)
    assert out.split() == ["1", "False", "posmlp_kernels"]


@pytest.mark.parametrize("parts", [("triton",), ("numpy", "timm", "torchvision", "matplotlib")], ids="-".join)
def test_without(parts):
    """What a user may not have: nothing of the operator needs it."""
    python(GATE + "\nassert 'reference' in posmlp_kernels.backends()", block=parts)


def test_without_triton_the_back_end_says_so():
    out = python("import posmlp_kernels as p; print(p.backends()); print(p.explain())", block=["triton"])
    assert "'triton'" not in out.splitlines()[0]
    (line,) = [line for line in out.splitlines()[1:] if line.startswith("triton")]
    assert "no: " in line and "triton" in line.split("no: ")[1].lower()


@pytest.mark.parametrize(
    "broken, reason",
    [
        (False, "posmlp_kernels._C was not built"),
        (True, "posmlp_kernels._C does not load"),
    ],
)
def test_without_the_compiled_part(broken, reason):
    """Not built, or built for something else: the reference serves, a named `cpu` raises with the reason."""
    out = python(
        GATE
        + """
print(posmlp_kernels.backends())
print(posmlp_kernels.explain())
try:
    run(case, make_inputs(case), "cpu")
except NotImplementedError as error:
    print(error)
""",
        block=["posmlp_kernels._C"],
        broken=broken,
    )
    lines = out.splitlines()
    assert "'cpu'" not in lines[0] and "'reference'" in lines[0]
    assert f"cpu        no: {reason}" in out
    assert lines[-1].startswith(f"backend 'cpu' cannot run this pos_gate: {reason}")


def test_a_torch_without_cuda_loads_no_cuda_library():
    """Built or not: the CUDA part would not load there, so it is not tried, and one line says why."""
    out = python("""
        import sys, torch
        torch.version.cuda = None
        import posmlp_kernels as p
        assert "posmlp_kernels._C_cuda" not in sys.modules and "cuda" not in p.backends()
        print(p.explain())
    """)
    assert "cuda       no: this torch has no CUDA\n" in out


def test_setup_builds_the_cuda_library_beside_a_torch_without_cuda(tmp_path):
    """`build_ext` as it is but for the compilers: torch's own check of CUDA must not stop either library."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "nvcc ran: $*"\n')
    nvcc.chmod(0o755)
    out = python(f"""
        import os, runpy, sys
        from torch.utils import cpp_extension
        cpp_extension.CUDA_HOME = None
        cpp_extension.BuildExtension.build_extension = lambda self, extension: print("built", extension.name)
        os.environ |= {{"PATH": {str(tmp_path)!r} + ":" + os.environ["PATH"], "TORCH_CUDA_ARCH_LIST": "8.0"}}
        for name in ("CUDA_HOME", "POSMLP_SKIP_CPU", "POSMLP_SKIP_CUDA"):
            os.environ.pop(name, None)
        sys.argv = ["setup.py", "build_ext", "--build-lib", {str(tmp_path)!r}]
        runpy.run_path("setup.py", run_name="__main__")
    """)
    assert "built posmlp_kernels._C\n" in out
    (command,) = [line for line in out.splitlines() if line.startswith("nvcc ran: ")]
    assert "arch=compute_80" in command and f"-o {tmp_path}/posmlp_kernels/_C_cuda" in command


def test_the_slow_choice_is_announced():
    """A user without the compiled part is told once, on the first call."""
    out = python(
        """
        import warnings, torch
        from posmlp_kernels import PosSGU
        layer, x = PosSGU(16, 4), torch.randn(1, 4, 4, 16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(x), layer(x)
        print(len(caught), caught[0].message)
        """,
        block=["posmlp_kernels._C"],
    )
    assert out.startswith("1 ") and "posmlp_kernels._C was not built" in out


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
def test_with_the_compiled_part_there_is_no_warning():
    python(
        GATE.replace('"ignore"', '"error"') + "\nassert 'cpu' in posmlp_kernels.backends()", block=["triton"]
    )


def test_public_names():
    names = {"PosSGU", "backends", "explain", "gqpe_table", "mixing_matrix", "pos_gate", "use_backend"}
    assert set(posmlp_kernels.__all__) == names
    assert all(hasattr(posmlp_kernels, name) for name in names)
