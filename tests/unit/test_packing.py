import numpy as np
import pytest
from scipy import sparse

from raysys.packing import packed, unpacked


def _arrays():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(50, 16)).astype(np.float32) * rng.uniform(0.01, 100, (50, 1)).astype(np.float32)
    matrix[3] = 0
    graph = sparse.random_array((60, 60), density=0.2, rng=rng, dtype=np.float32).tocsr()
    return {
        "matrix": matrix,
        "half": matrix.astype(np.float16),
        "indptr": graph.indptr.astype(np.int64),
        "indices": graph.indices.astype(np.int32),
        "values": graph.data,
        "bias": rng.normal(size=16).astype(np.float32),
        "long": rng.normal(size=1000).astype(np.float32),
        "signed": rng.integers(-300, 300, 400, dtype=np.int64),
        "flags": np.ones(300, np.uint8),
    }


def test_what_comes_back_has_the_types_and_nearly_the_values():
    arrays = _arrays()
    back = unpacked(*packed(arrays))
    assert {name: array.dtype for name, array in back.items()} == {name: array.dtype for name, array in arrays.items()}
    for name in ("indptr", "indices", "bias", "long", "signed", "flags"):
        np.testing.assert_array_equal(back[name], arrays[name])
    for name in ("matrix", "half"):
        bound = np.abs(arrays[name].astype(np.float32)).max(axis=1, keepdims=True) / 254 * 1.1
        assert (np.abs(back[name].astype(np.float32) - arrays[name].astype(np.float32)) <= bound).all()
    rows = np.repeat(np.arange(60), np.diff(arrays["indptr"]))
    peaks = np.zeros(60)
    np.maximum.at(peaks, rows, arrays["values"])
    assert (np.abs(back["values"] - arrays["values"]) <= peaks[rows] / 254 * 1.01).all()


def test_packed_arrays_are_smaller_and_packing_twice_changes_nothing_more():
    arrays = _arrays()
    first, notes = packed(arrays)
    assert sum(array.nbytes for array in first.values()) < 0.55 * sum(array.nbytes for array in arrays.values())
    assert first["matrix"].dtype == np.int8 and first["indices"].dtype == np.uint8 and first["signed"].dtype == np.int16
    once = unpacked(first, notes)
    twice = unpacked(*packed(once))
    np.testing.assert_allclose(twice["matrix"], once["matrix"], rtol=1e-5)


@pytest.mark.parametrize("arrays", [{}, {"empty": np.zeros((0, 4), np.float32), "indptr": np.zeros(1, np.int64), "values": np.zeros(0)}])
def test_nothing_stays_nothing(arrays):
    back = unpacked(*packed(arrays))
    assert back.keys() == arrays.keys()
