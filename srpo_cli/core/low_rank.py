"""The matrix of a given rank that is nearest to another (Eckart and Young, 1936)."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``up`` (out, r) and ``down`` (r, in) of the rank-r matrix nearest to ``matrix`` in Frobenius norm.

    ``up @ down`` is the truncated singular value decomposition. It comes from the leading eigenvectors of the smaller
    Gram matrix, in float64, at a fraction of the whole decomposition's cost. Each singular value is shared evenly
    between the factors, so that neither leaves the reach of a 16-bit float.

    Args:
        matrix: (out, in), finite, of any float dtype.
        rank: at least 1; r is the smallest of it, out and in.

    Returns the factors in the dtype of ``matrix``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        up, down = nearest_low_rank(matrix.T, rank)
        return down.T, up.T
    wide = matrix.double()
    basis = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)  # they come by rising eigenvalue
    rows = basis.T @ wide
    share = rows.norm(dim=1).sqrt()  # exact where the eigenvalue of a small singular value is not
    down = torch.where(share[:, None] > 0, rows / share[:, None], 0)
    return (basis * share).to(matrix.dtype), down.to(matrix.dtype)
