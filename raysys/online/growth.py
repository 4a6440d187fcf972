"""A bundle that knows more items: rows for what has been said over HTTP since it was made, without training anything.

A new row starts where its neighbours by content are, so that it means something
before the first event; an item without text starts at the mean of all and stays
silent in the encoder until somebody chose it.

Legend: N items of the bundle, M new items, D dimension of a model.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysys.bundle import Bundle
from raysys.features.text import TextEncoder, item_text
from raysys.models.content import ContentNeighbours
from raysys.models.dot_product import DotProduct
from raysys.models.interest import InterestEncoder, InterestRetriever
from raysys.models.newcomers import neighbour_weights
from raysys.online.feed import flat_sequences
from raysys.online.kinds import KINDS
from raysys.online.recent import RECENT
from raysys.schema import ITEM_ID, ITEM_IDX

NO_EVENTS = flat_sequences(np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int64), np.zeros(1, np.int64))


def grown(bundle: Bundle, new_items: Mapping[str, Mapping[str, Any]]) -> Bundle:
    """The bundle with a row for each new item at the end of every table; the manifest is that of the bundle.

    Args:
        bundle: the serving version; not changed.
        new_items: item id -> attributes, ids that the bundle does not have.
    """
    if not new_items:
        return bundle
    models = dict(bundle.models)
    num_items = bundle.items.num_rows + len(new_items)
    vectors = _content_of(models.get("content"), list(new_items.values()))
    if "content" in models:
        old = models["content"]
        models["content"] = old.with_vectors(np.concatenate([old.item_vectors, vectors]))
    known = bundle.items["num_train"].to_numpy() > 0
    mix = neighbour_weights(bundle.content_vectors, vectors, known)
    placed = np.any(vectors != 0, axis=1) if bundle.content_vectors is not None else np.zeros(len(new_items), bool)
    if "interest" in models:
        models["interest"] = _interest(models["interest"], mix, placed)
    for name in ("covisit", RECENT):
        if name in models:
            models[name] = models[name].update(NO_EVENTS, np.zeros(0, bool), num_items=num_items)
    if KINDS in models:
        models[KINDS] = models[KINDS].grown(mix)
    if "linear" in models:
        models["linear"] = models["linear"].grown(num_items)
    empty = NO_EVENTS
    models["popularity"] = models["popularity"].update(empty.items, empty.events, empty.times, num_items=num_items)
    if "dot_product" in models:
        models["dot_product"] = _dot_product(models["dot_product"], mix)
    if "ranker" in models:
        models["ranker"] = models["ranker"].grown(mix, vectors)
    return Bundle(_table(bundle.items, new_items), models, bundle.fusion, bundle.histories, bundle.manifest)


def _content_of(content: ContentNeighbours | None, items: list[Mapping[str, Any]]) -> np.ndarray:
    """(M, D) float32 unit vectors, zero without text; D = 0 without a content model."""
    if content is None:
        return np.zeros((len(items), 0), np.float32)
    texts = [item_text(item.get("title"), item.get("text"), item.get("categories")) for item in items]
    return content.transform(TextEncoder().encode(texts))


def _interest(retriever: InterestRetriever, mix: np.ndarray, placed: np.ndarray) -> InterestRetriever:
    old = retriever.encoder
    encoder = InterestEncoder(old.num_items + len(mix), old.num_event_types, old.config)
    state = old.state_dict()
    table = state["items.weight"]
    rows = torch.from_numpy(mix.astype(np.float32)) @ table[:-1]
    encoder.load_state_dict({**state, "items.weight": torch.cat([table[:-1], rows, table[-1:]])})
    return InterestRetriever(encoder, np.concatenate([retriever.warm, placed]))


def _dot_product(model: DotProduct, mix: np.ndarray) -> DotProduct:
    weights = np.concatenate([model.weights, model.weights @ mix.T], axis=1)
    return DotProduct(weights, np.concatenate([model.item_vectors, mix @ model.item_vectors]), model.calibration, model.config)


def _table(items: pa.Table, new_items: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """The item table with the new rows; an attribute that its column cannot hold is null (the service's state still has it)."""
    given = {ITEM_IDX: list(range(items.num_rows, items.num_rows + len(new_items))), ITEM_ID: list(new_items)}
    columns = []
    for field in items.schema:
        if field.name in given:
            values = given[field.name]
        elif field.name == "num_train":
            values = [0] * len(new_items)
        else:
            values = [_fitting(attributes.get(field.name), field.type) for attributes in new_items.values()]
        columns.append(pa.array(values, field.type))
    return pa.concat_tables([items, pa.Table.from_arrays(columns, schema=items.schema)]).combine_chunks()


def _fitting(value: Any, type_: pa.DataType) -> Any:
    try:
        return pa.array([value], type_)[0].as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None
