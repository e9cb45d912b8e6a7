"""Which arrays a user gave: names, kinds, shapes, overlaps. Every check here comes before the first write."""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _extension

Array = NDArray[Any]

DTYPES = "float32, float64, float16 or bfloat16"

# np.shares_memory is exact but can take exponential time for strange strides; beyond this many steps of work two arrays
# whose address ranges intersect count as overlapping.
MAX_OVERLAP_WORK = 100_000

CACHE_LINE = 64
PAGE = 4096  # CPUs compare the last 12 bits of addresses, however large the system's pages are

NUMPY_FLOATS = frozenset([np.float32, np.float64, np.float16])


def is_supported(dtype: np.dtype[Any]) -> bool:
    return dtype.type in NUMPY_FLOATS or dtype.name == "bfloat16"  # the name takes a microsecond or two


def as_array(value: Any, label: str) -> Array:
    """A NumPy array that shares the memory of `value`."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{label}: expected an array without a mask, got a masked array")
    if isinstance(value, np.ndarray):
        return np.asarray(value)  # of a subclass, its plain view
    try:
        if hasattr(value, "__array_interface__") and not isinstance(value, np.generic):
            return np.asarray(value)
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        if not isinstance(value, (bytes, str, np.generic)):
            return np.asarray(memoryview(value))
    except TypeError:
        pass
    except Exception as error:
        kind = type(value).__name__
        raise TypeError(f"{label}: expected an array, got {kind} that cannot be viewed as one: {error}") from error
    raise TypeError(f"{label}: expected an array, got {type(value).__name__}")


def check_dtype(array: Array, label: str) -> None:
    if not is_supported(array.dtype):
        raise TypeError(f"{label}: expected dtype {DTYPES}, got {array.dtype}")
    if not array.dtype.isnative:
        raise TypeError(f"{label}: expected native byte order, got {array.dtype.str}")


def as_writeable(value: Any, label: str, any_dtype: bool = False) -> Array:
    """`value` as an array that can be changed in place."""
    array = as_array(value, label)
    if not any_dtype:
        check_dtype(array, label)
    if not array.flags.writeable:
        raise ValueError(f"{label}: expected a writeable array, got a read-only one")
    if overlaps_itself(array):
        raise ValueError(f"{label}: expected elements of their own, got an array whose elements share memory")
    return array


def as_gradient(value: Any, label: str) -> Array:
    """`value` as an array that can be read."""
    array = np.asarray(value) if isinstance(value, np.generic) else as_array(value, label)
    check_dtype(array, label)
    return array


def check_state(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], label: str) -> None:
    """Refuse what cannot be a state array of this shape and dtype."""
    if array.dtype != dtype:
        raise TypeError(f"{label}: expected dtype {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{label}: expected shape {shape}, got {array.shape}")


def overlaps_itself(array: Array) -> bool:
    """Whether two elements of an array share memory."""
    if array.flags.c_contiguous:
        return False
    dims = sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape) if size > 1)
    if array.size <= 1:
        return False
    extent = array.itemsize
    for stride, size in dims:
        if stride < extent:
            break
        extent = stride * (size - 1) + extent
    else:
        return False
    # Interleaved or shared: look at the address of every element.
    offsets = np.zeros(1, dtype=np.intp)
    for stride, size in dims:
        offsets = (offsets[:, None] + stride * np.arange(size)).reshape(-1)
    offsets.sort()
    return bool((np.diff(offsets) < array.itemsize).any())


def byte_bounds(array: Array) -> tuple[int, int]:
    """First address, and the one after the last, of an array's elements."""
    # Without the extension NumPy's own way, which takes a microsecond.
    low = high = array.ctypes.data if _extension.core is None else _extension.core.address(array)
    for stride, size in zip(array.strides, array.shape):
        if stride < 0:
            low += stride * (size - 1)
        else:
            high += stride * (size - 1)
    return low, high + array.itemsize


def memory_axes(array: Array) -> list[int]:
    """The axes of an array in the order of its memory."""
    return sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))


def flat(array: Array, axes: list[int]) -> Array:
    """The elements of an array in this order of its axes; a view if they lie so."""
    return array.transpose(axes).reshape(-1)


def shaped(elements: Array, shape: tuple[int, ...], axes: list[int]) -> Array:
    """The reverse: a view of this shape."""
    return elements.reshape([shape[axis] for axis in axes]).transpose([axes.index(a) for a in range(len(shape))])


def zeros_together(models: Iterable[tuple[Array, list[int], np.dtype[Any]]]) -> list[Array]:
    """Zeros of the shapes of some arrays, their axes in these orders, in one block of memory.

    Each lies to its cache lines as its model does: loops over both then meet the lines' ends at the same elements. One of
    several pages lies to its page as its model does: a load waits for a store that is still on its way to the same place of
    another page, and this way the same place means the same element, which has been loaded before.
    """
    models = list(models)
    places, size = [], 0
    for model, _, dtype in models:
        n_bytes = model.size * dtype.itemsize
        unit = PAGE if n_bytes >= 4 * PAGE else CACHE_LINE
        model_start = byte_bounds(model)[0] // dtype.itemsize * dtype.itemsize
        place = size + (model_start - size) % unit
        places.append(place)
        size = -(-(place + n_bytes) // CACHE_LINE) * CACHE_LINE
    block = np.zeros(size + PAGE, np.uint8)
    block = block[-block.ctypes.data % PAGE :]
    arrays = []
    for (model, axes, dtype), place in zip(models, places):
        elements = block[place : place + model.size * dtype.itemsize].view(dtype)
        arrays.append(shaped(elements, model.shape, axes))
    return arrays


def overlap(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=MAX_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def check_overlaps(written: Iterable[tuple[str, Array]], read: Iterable[tuple[str, Array]] | None = None) -> None:
    """Refuse arrays that share memory: two of those to be written; or, given those to be read, one of each."""
    spans = [(*byte_bounds(a), True, label, a) for label, a in written if a.size]
    spans += [(*byte_bounds(a), False, label, a) for label, a in read or () if a.size]
    spans.sort(key=lambda span: span[0])
    open_spans: list[tuple[int, int, bool, str, Array]] = []
    for span in spans:
        low, _, is_written, label, array = span
        open_spans = [other for other in open_spans if other[1] > low]
        for _, _, other_is_written, other_label, other_array in open_spans:
            matters = is_written and other_is_written if read is None else is_written != other_is_written
            if matters and overlap(array, other_array):
                raise ValueError(f"{other_label} and {label}: expected separate arrays, got arrays that share memory")
        open_spans.append(span)


Change = tuple[Any, Any, Any]
"""A container, a key, and the value to be there: of an array all of it (...), of a dictionary an item."""


def assignment(changes: list[Change]) -> Callable[[], None]:
    """A function that makes all changes or none, once: another call does nothing.

    Python handles signals only between its instructions, and calling this is a single one, with no memory to allocate.
    """
    containers, keys, values = zip(*changes) if changes else ((), (), ())
    nowhere: collections.deque[None] = collections.deque(maxlen=0)
    return functools.partial(nowhere.extend, map(operator.setitem, containers, keys, values))


def assign(changes: list[Change]) -> None:
    """Make all changes or none."""
    assignment(changes)()
