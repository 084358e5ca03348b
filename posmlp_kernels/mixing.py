"""The mixing matrix that a relative table and a free matrix generate.

A table R holds one value for every displacement delta = position(key) - position(query) inside a window,
`[S, *(2*window-1)]`, indexed by `delta + (window - 1)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .problem import check_mixing


def expand_table(table: Tensor, window: tuple[int, ...]) -> Tensor:
    """`R[S, *(2*window-1)] -> L[S, N, N]`, `L[g, i, j] = R[g, position(j) - position(i)]`."""
    rank = len(window)
    for axis, size in enumerate(window, start=1):
        table = table.unfold(axis, size, 1)  # a row of keys for each query, the last query first
    return table.flip(tuple(range(1, rank + 1))).flatten(1, rank).flatten(2)


def mixing_matrix(
    table: Tensor | None, window: int | Sequence[int], softmax: bool, matrix: Tensor | None = None
) -> Tensor:
    """The mixing matrix `P` of a whole window, query x key, as the operator generates it.

    Args:
        table: `[S, *(2*window-1)]` or None.
        window: one size per map dimension (an int stands for all of the table's dimensions).
        softmax: normalise every row over its keys.
        matrix: `[N, N]` or `[S, N, N]`, added to the table's values before the softmax.

    Returns: `[S, N, N]`. Raises: `ValueError` for shapes that do not fit.
    """
    if isinstance(window, int):
        if table is None:
            raise ValueError(
                f"window must be one size per map dimension where there is no table, got {window!r}"
            )
        window = (window,) * (table.dim() - 1)
    window, _ = check_mixing(table, window, matrix)
    logits = 0 if table is None else expand_table(table, window)
    if matrix is not None:
        logits = logits + matrix
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    return logits.softmax(-1) if softmax else logits
