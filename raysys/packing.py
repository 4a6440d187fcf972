"""Arrays in fewer bytes: int8 with a scale a row, and the smallest integers that hold the values.

Reading gives models the types they expect, so that no model knows of it. The
error of an int8 value is at most 1/254 of the largest of its row.
"""

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
SCALE = ".scale"
MIN_VALUES = 256
"""Smaller arrays stay as they are: biases and norms are sensitive, and weigh nothing."""


def packed(arrays: Arrays) -> tuple[Arrays, dict[str, dict[str, Any]]]:
    """The arrays of one model in fewer bytes.

    Float matrices are packed by row. So are the values of a sparse matrix, which are known by an `indptr` that ends where they do.
    Integers take the smallest type that holds them all.

    Args:
        arrays: by name.

    Returns:
        Arrays to write, and how to read them: name -> {"kind", "dtype"} of those that changed.
    """
    found, notes = {}, {}
    for name, array in arrays.items():
        note: dict[str, Any] = {"dtype": str(array.dtype)}
        if array.dtype.kind == "f" and array.size >= MIN_VALUES and array.ndim == 2:
            found[name], found[name + SCALE] = _int8(array, np.abs(array).max(axis=1, initial=0.0)[:, None])
            notes[name] = {"kind": "rows", **note}
        elif array.dtype.kind == "f" and array.ndim == 1 and _is_sparse(arrays, array):
            lengths = np.diff(arrays["indptr"])
            row_peaks = np.zeros(len(lengths))
            np.maximum.at(row_peaks, np.repeat(np.arange(len(lengths)), lengths), np.abs(array))
            found[name], found[name + SCALE] = _int8(array, np.repeat(row_peaks, lengths), row_peaks)
            notes[name] = {"kind": "sparse", **note}
        elif array.dtype.kind in "iu" and array.size >= MIN_VALUES:
            low, high = int(array.min()), int(array.max())
            found[name] = array.astype(np.min_scalar_type(min(low, -high - 1) if low < 0 else high))
            notes[name] = {"kind": "integers", **note}
        else:
            found[name] = array
    return found, notes


def unpacked(arrays: Arrays, notes: dict[str, dict[str, Any]]) -> Arrays:
    """The arrays that `packed` was given, but for rounding."""
    found = {name: array for name, array in arrays.items() if name.removesuffix(SCALE) not in notes}
    for name, note in notes.items():
        array = arrays[name]
        if note["kind"] == "rows":
            array = array.astype(np.float32) * arrays[name + SCALE]
        elif note["kind"] == "sparse":
            lengths: Any = np.diff(arrays["indptr"].astype(np.int64))
            array = array.astype(np.float32) * np.repeat(arrays[name + SCALE], lengths)
        found[name] = array.astype(note["dtype"])
    return found


def _int8(array: np.ndarray, peaks: np.ndarray, kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Values in [-127, 127], and the float32 scale of each row."""
    scale = np.where(peaks > 0, peaks / 127.0, 1.0).astype(np.float32)
    values = np.rint(array.astype(np.float32) / scale).clip(-127, 127).astype(np.int8)
    return values, scale if kept is None else np.where(kept > 0, kept / 127.0, 1.0).astype(np.float32)


def _is_sparse(arrays: Arrays, values: np.ndarray) -> bool:
    return "indptr" in arrays and len(values) >= MIN_VALUES and len(values) == arrays["indptr"][-1]
