"""What can be taken away from a bundle without training: sources, entries, bits. Each gives a new bundle in memory."""

import dataclasses

import numpy as np

from raysys.bundle import Bundle, load_model
from raysys.models.base import Arrays
from raysys.models.content import projected
from raysys.models.fusion import Fusion
from raysys.packing import packed, unpacked

ALWAYS = ("popularity", "content", "ranker")
"""Kept whatever their weight: popularity answers to strangers, content places new items, the ranker gives probabilities."""
SPARSE = {"linear": "coefficients", "covisit": "counts", "recent": "counts"}
"""Sources that are a sparse matrix -> the name of its values."""


def without_unused(bundle: Bundle) -> Bundle:
    """Without the sources that have no weight and that the ranker does not look at."""
    weights = bundle.fusion["mixture"]["weights"]
    looked_at = {*bundle.fusion.get("ranker_sources", ()), *ALWAYS}
    return _of_sources(bundle, {name for name in bundle.models if name in looked_at or weights.get(name, 0.0) > 0})


def without_weak(bundle: Bundle, share: float) -> Bundle | None:
    """Without the sources that have less than a share of the mixture, for the ranker too.

    None where there is none, or where a judge looks at all of them.
    """
    weights, ranker = bundle.fusion["mixture"]["weights"], bundle.models.get("ranker")
    weak = {name for name in bundle.models if name not in ALWAYS and weights.get(name, 0.0) < share}
    if not weak or (ranker is not None and ranker.judge is not None):
        return None
    fewer = _of_sources(bundle, set(bundle.models) - weak)
    if ranker is None:
        return fewer
    ranker = ranker.without(weak)
    fusion = {**fewer.fusion, "ranker_sources": list(ranker.sources)}
    return dataclasses.replace(fewer, models={**fewer.models, "ranker": ranker}, fusion=fusion)


def ranking_fewer(bundle: Bundle, count: int) -> Bundle | None:
    """With fewer candidates from retrieval to ranking; None where they are no more."""
    if count >= bundle.num_candidates:
        return None
    return dataclasses.replace(bundle, fusion={**bundle.fusion, "num_candidates": count})


def shortened(bundle: Bundle, share: float) -> Bundle | None:
    """With an encoder that answers from the last events alone, a share of those it has learnt from; None where there is nothing to cut."""
    retriever = bundle.models.get("interest")
    if retriever is None:
        return None
    config = retriever.encoder.config
    length = max(1, round(share * config.max_length))
    if length >= config.looked_at:
        return None
    arrays, meta = retriever.to_arrays()
    meta = {**meta, "config": {**meta["config"], "answer_length": length}}
    return dataclasses.replace(bundle, models={**bundle.models, "interest": load_model("interest", arrays, meta)})


def narrowed(bundle: Bundle, width: int) -> Bundle | None:
    """With content vectors on their principal axes alone, in retrieval and in the ranker; None where they are no wider.

    Axes of the second moment, not of the covariance: cosines are about the origin.
    """
    content = bundle.models.get("content")
    if content is None or content.item_vectors.shape[1] <= width:
        return None
    moment = content.item_vectors.T.astype(np.float64) @ content.item_vectors
    axes = np.ascontiguousarray(np.linalg.eigh(moment)[1][:, ::-1][:, :width].astype(np.float32))
    models = {**bundle.models, "content": content.narrowed(axes)}
    if "ranker" in models:
        arrays, meta = models["ranker"].to_arrays()
        if arrays["content_vectors"].shape[1]:
            arrays["content_vectors"] = projected(arrays["content_vectors"].astype(np.float32), axes)
            models["ranker"] = load_model("ranker", arrays, meta)
    return dataclasses.replace(bundle, models=models)


def pruned(bundle: Bundle, most: int) -> Bundle:
    """With at most so many entries, the largest ones, in each row of the sparse sources."""
    models = dict(bundle.models)
    for name, values in SPARSE.items():
        if name in models:
            arrays, meta = models[name].to_arrays()
            models[name] = load_model(name, _largest_entries(arrays, values, most), meta)
    return dataclasses.replace(bundle, models=models)


def quantized(bundle: Bundle) -> Bundle:
    """With the rounding that packed arrays have when they are read again."""
    models = {}
    for name, model in bundle.models.items():
        arrays, meta = model.to_arrays()
        models[name] = load_model(name, unpacked(*packed(arrays)), meta)
    return dataclasses.replace(bundle, models=models)


def _of_sources(bundle: Bundle, names: set[str]) -> Bundle:
    mixture = bundle.fusion["mixture"]
    models = {name: model for name, model in bundle.models.items() if name in names}
    temperatures = {name: value for name, value in mixture["temperatures"].items() if name in models}
    fusion = Fusion.of({name: weight for name, weight in mixture["weights"].items() if name in models}, temperatures)
    return dataclasses.replace(bundle, models=models, fusion={**bundle.fusion, "mixture": fusion.to_dict()})


def _largest_entries(arrays: Arrays, values: str, most: int) -> Arrays:
    lengths = np.diff(arrays["indptr"])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    # By row, then by falling size; the place in its row decides who stays.
    order = np.lexsort((-np.abs(arrays[values]), rows))
    place = np.empty(len(rows), np.int64)
    place[order] = np.arange(len(rows)) - np.repeat(arrays["indptr"][:-1], lengths)
    kept = place < most
    indptr = np.concatenate([[0], np.cumsum(np.minimum(lengths, most))]).astype(np.int64)
    return {**arrays, "indptr": indptr, "indices": arrays["indices"][kept], values: arrays[values][kept]}
