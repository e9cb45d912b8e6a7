"""Sums and norms, in an order that kernels can follow: over fixed blocks and lanes, in double, combined pairwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


BLOCK = 1024
LANES = 16
CHUNK = 32

# Squares of finite doubles may overflow or vanish: sums outside this range are taken again, scaled by 2**-(+-RESCUE).
BIG_SUM, SMALL_SUM, RESCUE = 2.0**1000, 2.0**-900, 600


def pairwise_sum(values: Array) -> Any:
    """Sum of float64 values along the last axis, in a binary tree over neighbours, as if filled up with zeros."""
    if values.shape[-1] == 0:
        return values.sum(-1)
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


def sum_of(x: Array) -> Any:
    """Sum along the last axis in double: lanes within blocks, folded in halves, blocks pairwise."""
    *others, n = x.shape
    block = BLOCK if n > BLOCK else -(-n // LANES) * LANES  # a short one counts as filled up with zeros
    n_blocks = -(-n // BLOCK)
    with np.errstate(all="ignore"):
        padded = np.zeros([*others, n_blocks * block])
        padded[..., :n] = x
        rows = padded.reshape(*others, n_blocks, block // LANES, LANES)
        lanes = np.zeros([*others, n_blocks, LANES])
        for k in range(block // LANES):
            lanes += rows[..., k, :]
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        return pairwise_sum(lanes[..., 0])


def sum_squares(g: Array, scale: float = 1.0) -> Any:
    """:func:`sum_of` of ``(scale * g)**2``, computed in double."""
    with np.errstate(all="ignore"):
        scaled = g.astype(np.float64) * scale
        return sum_of(scaled * scaled)


def sum_squares_of_columns(matrices: Array) -> Array:
    """Sum of squares along the last but one axis, in double: in order within CHUNK rows, these pairwise."""
    *others, n, n_columns = matrices.shape
    n_chunks = -(-n // CHUNK)
    with np.errstate(all="ignore"):
        padded = np.zeros([*others, n_chunks * CHUNK, n_columns])
        padded[..., :n, :] = matrices.astype(np.float64)
        chunks = (padded * padded).reshape(*others, n_chunks, CHUNK, n_columns)
        sums = np.zeros([*others, n_chunks, n_columns])
        for k in range(CHUNK):
            sums += chunks[..., k, :]
        return np.asarray(pairwise_sum(np.moveaxis(sums, -2, -1)))


def scaled_sums(rows: Array) -> list[tuple[float, int]]:
    """For each row what follows."""
    totals = sum_squares(rows).tolist()
    is_good = [SMALL_SUM <= total <= BIG_SUM for total in totals]
    return [(total, 0) if good else scaled_sum_squares(row) for total, good, row in zip(totals, is_good, rows)]


def scaled_sum_squares(g: Array) -> tuple[float, int]:
    """Sum of squares as ``sum * 4**exponent``: no finite input overflows or vanishes; nan or inf for others."""
    total = float(sum_squares(g))
    if SMALL_SUM <= total <= BIG_SUM:
        return total, 0
    if g.dtype == np.float32 or math.isnan(total):
        return total, 0
    if total > BIG_SUM:
        return float(sum_squares(g, 2.0**-RESCUE)), RESCUE
    return float(sum_squares(g, 2.0**RESCUE)), -RESCUE


def norm(x: Array) -> float:
    """The root of :func:`scaled_sum_squares`."""
    total, exponent = scaled_sum_squares(x)
    return ldexp(math.sqrt(total), exponent)


def ldexp(x: float, exponent: int) -> float:
    """``x * 2**exponent``, inf where that is too large."""
    try:
        return math.ldexp(x, exponent)
    except OverflowError:
        return math.inf


def combine(sums: list[tuple[float, int]]) -> tuple[float, int]:
    """Norm over arrays with these scaled sums of squares, as ``root * 2**exponent``."""
    exponent = max((e for total, e in sums if total > 0), default=0)
    squares = [ldexp(total, 2 * (e - exponent)) for total, e in sums]
    with np.errstate(all="ignore"):
        return math.sqrt(pairwise_sum(np.array(squares))), exponent


def combine_clipped(sums: list[tuple[float, int]], factors: list[float]) -> tuple[float, int]:
    """The same with each array's norm first scaled by its factor, which can be as tiny as the norm was large.

    What still vanishes when squared is too small to be clipped.
    """
    norms = [math.frexp(math.sqrt(total) * f) for (total, _), f in zip(sums, factors)]
    norms = [(mantissa, own + e) for (mantissa, own), (_, e) in zip(norms, sums)]
    exponent = max([0, *(e for mantissa, e in norms if math.isfinite(mantissa))])
    scaled = np.array([ldexp(mantissa, e - exponent) for mantissa, e in norms])
    with np.errstate(all="ignore"):
        return math.sqrt(pairwise_sum(scaled * scaled)), exponent


def clip_factor(root: float, exponent: int, max_norm: float | None, eps: float = 1e-6) -> float:
    """``min(1, max_norm / (norm + eps))`` for ``norm = root * 2**exponent``."""
    if max_norm is None:
        return 1.0
    norm = ldexp(root, exponent)
    if math.isinf(norm) and math.isfinite(root):
        factor = ldexp(max_norm / root, -exponent)
    elif norm + eps == 0:
        return 1.0
    else:
        factor = max_norm / (norm + eps)
    return 1.0 if factor >= 1 else factor
