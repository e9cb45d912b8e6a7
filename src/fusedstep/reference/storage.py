"""What parameters and states are stored in, and how they get there from the type they are computed in, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._arrays import NUMPY_FLOATS, flat, shaped
from .sums import BLOCK

Array = NDArray[Any]


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type a parameter of this storage type is computed in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


SCALED = 256
"""Neighbours that share the scale of an 8-bit state."""

# A code is what the upper bits of a float32, 3 of them mantissa, of a magnitude plus a base have more than those of the base
# alone: steps of an eighth of it from 0 on, which double whenever the sum does. The base is this times a scale, a power of
# two of which the largest of SCALED elements is 7/8 to 7/4 times. That makes codes of 8 bits for states that cannot be
# negative, of 7 beside a sign for the others.
LEAST = {np.dtype(np.int8): np.float32(2.0**-15), np.dtype(np.uint8): np.float32(2.0**-31)}


def is_small(dtype: np.dtype[Any]) -> bool:
    """Whether a state of this type is rounded at random."""
    return dtype.type not in NUMPY_FLOATS and (dtype in LEAST or dtype.name == "bfloat16")


def mix(z: int | Array) -> Any:
    """64 bits that look random, from 64 that count (splitmix64)."""
    z = (z + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31


FOR_STATES, FOR_PARAM = 0, 1
"""What fractions are for: an element's states share one, which is not that of the parameter."""


def random_fractions(seed: int, step: int, array: int, use: int, size: int) -> Array:
    """A random fraction of 2**20 for each element of an array, by seed, step, number of the array, use and place.

    A number is rounded up if this and what is lost make 1. Two elements, half of SCALED apart, share 32 bits: one has the
    lower of them, the other one the upper.
    """
    first = mix(mix(mix(seed) + step) + 2 * array + use)
    keys = np.array(
        [mix((first + block) & 0xFFFFFFFFFFFFFFFF) & 0xFFFFFFFF for block in range(-(-size // BLOCK))], np.uint32
    )
    place = np.arange(BLOCK, dtype=np.uint32).reshape(-1, SCALED)[:, : SCALED // 2]
    x = keys[:, None, None] + place * np.uint32(0x9E3779B9)
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * np.uint32(0x846CA68B)
    return np.concatenate([x & 0xFFFFF, x >> 12], axis=2).reshape(-1)[:size]


def load_state(state: Array, scales: Array | None, axes: list[int], dtype: np.dtype[Any]) -> Array:
    """A state for its rule: itself, or a small one in the compute type."""
    if not is_small(state.dtype):
        return state
    return shaped(load_small(flat(state, axes), scales).astype(dtype), state.shape, axes)


def store_state(values: Array, state: Array, scales: Array | None, axes: list[int], random: Array | None = None) -> None:
    """The reverse for a small state; by default each value goes to the nearest."""
    if random is None:
        random = np.full(values.size, 0x80000, np.uint32)
    with np.errstate(all="ignore"):
        elements = flat(values, axes).astype(np.float32)
    codes = np.empty(state.size, state.dtype)
    store_small(elements, codes, scales, random)
    state[...] = shaped(codes, state.shape, axes)


def load_small(state: Array, scales: Array | None) -> Array:
    """A flat small state in float32."""
    if scales is None:
        return state.astype(np.float32)
    codes = state.view(np.uint8).astype(np.uint32)
    negative = codes & (0x80 if state.dtype == np.int8 else 0)
    with np.errstate(all="ignore"):
        base = np.repeat(LEAST[state.dtype] * scales, SCALED)[: codes.size]
        x = (((codes ^ negative) << 20) + base.view(np.uint32)).view(np.float32) - base
    loaded: Array = (x.view(np.uint32) | negative << 24).view(np.float32)
    return loaded


def store_small(values: Array, state: Array, scales: Array | None, random: Array) -> None:
    """Round flat float32 values into a flat small state: up as often as the distance to the value below calls for.

    ``random`` has a fraction of 2**20 for each; half of that rounds to the nearest. In a state that cannot be negative, by
    which rules divide, nothing becomes 0 beside what is not. Neighbours of what is not finite become nan.
    """
    if scales is None:
        state.view(np.uint16)[:] = bfloat16_at_random(values, random)
        return
    bits = values.view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    least, is_signed = LEAST[state.dtype], state.dtype == np.int8
    largest = np.maximum.reduceat(magnitude, np.arange(0, values.size, SCALED)) if values.size else magnitude
    fitting = (largest + 0x1FFFFF & 0x7F800000).view(np.float32)
    scale, finite = np.clip(fitting, np.float32(2.0**-126) / least, np.float32(2.0**127)), largest < 0x7F800000
    base, finite_too, any_too = (np.repeat(x, SCALED)[: values.size] for x in (least * scale, finite, largest > 0))
    with np.errstate(all="ignore"):
        sums = magnitude.view(np.float32) + base
    code = np.minimum((sums.view(np.uint32) - base.view(np.uint32) + random) >> 20, 0x7F if is_signed else 0xFF)
    code = code | bits >> 24 & 0x80 if is_signed else np.maximum(code, any_too)
    state.view(np.uint8)[:] = np.where(finite_too, code, 0)
    scales[:] = np.where(finite, scale, np.float32(np.nan))


def bfloat16_at_random(values: Array, random: Array) -> Array:
    """The bits of the bfloat16 that float32 values are rounded to."""
    bits = values.view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    rounded = np.where(magnitude >= 0x7F800000, bits, bits + (random >> 4))
    return rounded >> 16 | np.where(magnitude > 0x7F800000, np.uint32(0x40), np.uint32(0))


def float16_at_random(values: Array, random: Array) -> Array:
    """The bits of the float16 that float32 values are rounded to; to the nearest from the largest on."""
    bits = values.view(np.uint32)
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 16 & 0x8000
    is_subnormal = magnitude < 0x38800000
    normal = (magnitude - np.uint32(112 << 23) + (random >> 7)) >> 13
    multiple = np.where(is_subnormal, magnitude, 0).astype(np.uint32).view(np.float32) * np.float32(2.0**37)
    subnormal = (multiple.astype(np.uint32) + (random >> 7)) >> 13
    with np.errstate(all="ignore"):
        nearest = values.astype(np.float16).view(np.uint16)
    return np.where(magnitude >= 0x477FE000, nearest, np.where(is_subnormal, subnormal, normal) | sign)


def join(param: Array, low_precision: str, residual: Array | None) -> Array:
    """A parameter of 16 bits in float32, with what is kept beside it."""
    with np.errstate(all="ignore"):
        exact = param.astype(np.float32)
        if low_precision == "kahan" and residual is not None:
            exact += residual.astype(np.float32)
        elif low_precision == "split" and residual is not None:
            exact = np.asarray(exact.view(np.int32) + residual).view(np.float32)
        elif low_precision == "master" and residual is not None:
            exact[...] = residual
    return exact


def part(exact: Array, param: Array, low_precision: str, residual: Array | None, random: Array | None) -> None:
    """The reverse. ``random`` has a fraction of 2**20 for each element, of which only ``stochastic`` makes use."""
    with np.errstate(all="ignore"):
        if low_precision == "stochastic" and random is not None:
            at_random = float16_at_random if param.dtype == np.float16 else bfloat16_at_random
            param[...] = at_random(exact, random).astype(np.uint16).view(param.dtype)
        elif low_precision == "split" and residual is not None:
            bits = exact.view(np.uint32)
            rounded = np.where(np.isnan(exact), np.uint32(0x7FC00000), (bits + 0x8000) & 0xFFFF0000)
            param[...] = (rounded >> 16).astype(np.uint16).view(param.dtype)
            residual[...] = np.where(np.isnan(exact), 0, bits - rounded).astype(np.uint32).view(np.int32)
        else:
            param[...] = exact
            if low_precision == "kahan" and residual is not None:
                lost = exact - param.astype(np.float32)
                residual[...] = np.where(np.isfinite(lost), lost, 0)
            elif low_precision == "master" and residual is not None:
                residual[...] = exact
