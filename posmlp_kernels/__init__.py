"""Fused positional spatial gating for PyTorch (PosMLP, ACM MM 2022)."""

from .dispatch import backends, use_backend
from .encodings import gqpe_table
from .layers import PosSGU
from .mixing import mixing_matrix
from .operator import explain, pos_gate

__all__ = ["PosSGU", "backends", "explain", "gqpe_table", "mixing_matrix", "pos_gate", "use_backend"]
__version__ = "0.1.0"
