"""The items as the service sees them: a bundle's table, and what has been said over HTTP since.

Legend: N items of the bundle, M live items (unknown to the bundle).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from raysys.bundle import Bundle
from raysys.errors import SchemaError
from raysys.events.state import ItemState
from raysys.features.text import TextEncoder, item_text
from raysys.schema import ITEM_ID, ITEM_IDX

HIDDEN_COLUMNS = frozenset({ITEM_IDX, "num_train", "image", "audio"})
OPERATORS = ("equals", "in", "any", "range", "not")

Rule = Callable[[Any], bool]


@dataclass(frozen=True)
class CatalogueBounds:
    """What a catalogue keeps in memory beside the bundle's own items."""

    live_items: int = 20_000
    """Items unknown to the bundle that can be recommended, by content, and as many that were deleted; those of the latest changes stay."""
    masks_bytes: int = 64 << 20
    """Masks of filters that were asked for, a byte an item each; those asked for last stay, one at least."""


class Catalogue:
    """Attributes, availability and filters over N bundle items and M live ones.

    Args:
        items: the bundle's table, row = item row; may be empty.
        encode: text of live items -> (M, D) float32 unit vectors; None without content vectors.
        bounds: of what is kept.
    """

    def __init__(self, items: pa.Table, encode: Callable[[list[dict]], np.ndarray] | None = None, bounds: CatalogueBounds | None = None):
        self.items, self._encode, self.bounds = items, encode, bounds or CatalogueBounds()
        self.item_ids: list[str] = items[ITEM_ID].to_pylist()
        self.index = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self.columns = [name for name in items.column_names if name not in HIDDEN_COLUMNS and not name.endswith("_embedding")]
        self.sequence = 0
        self.overlay: dict[str, ItemState] = {}
        self.live: dict[str, np.ndarray | None] = {}
        self._gone: dict[str, None] = {}  # neither of the bundle nor live: deleted, or not available
        self._forgot = False  # whether a change of an item unknown to the bundle was dropped from memory
        self._changed_names: set[str] = set()
        available = items["available"].fill_null(True).to_numpy() if "available" in items.column_names else np.ones(len(self.item_ids))
        self.available = available.astype(bool)
        self._masks: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.masks_made = 0
        self._codes: dict[str, tuple[np.ndarray, list[Any]]] = {}  # of columns that were filtered by; 4 bytes an item each

    def apply(self, changes: Iterable[tuple[str, ItemState]]) -> None:
        """Take in item changes in their order."""
        fresh: list[str] = []
        for item_id, state in changes:
            self.sequence = max(self.sequence, state.sequence)
            self.overlay[item_id] = state
            self._changed_names.update(state.attributes)
            usable = not state.deleted and self.attributes(item_id).get("available") is not False
            row = self.index.get(item_id)
            if row is not None:
                self.available[row] = usable
                continue
            self.live.pop(item_id, None)  # and again at the end: in the order of changes
            self._gone.pop(item_id, None)
            if usable:
                self.live[item_id] = None
                fresh.append(item_id)
            else:
                self._gone[item_id] = None
        fresh = list(dict.fromkeys(item_id for item_id in fresh if item_id in self.live))[-self.bounds.live_items :]
        if fresh and self._encode is not None:
            for item_id, vector in zip(fresh, self._encode([self.attributes(item_id) for item_id in fresh]), strict=True):
                self.live[item_id] = vector
        for kept in (self.live, self._gone):
            while len(kept) > self.bounds.live_items:
                oldest = next(iter(kept))
                del kept[oldest], self.overlay[oldest]  # type: ignore[attr-defined]
                self._forgot = True
        self._masks.clear()
        self.__dict__.pop("live_matrix", None)

    @cached_property
    def live_matrix(self) -> tuple[list[str], np.ndarray]:
        """Ids and (M, D) float32 vectors of live items that have content."""
        found = [(item_id, vector) for item_id, vector in self.live.items() if vector is not None]
        return [item_id for item_id, _ in found], np.stack([v for _, v in found]) if found else np.zeros((0, 0), np.float32)

    def known(self, item_id: str) -> bool:
        """Whether the item exists and is not deleted."""
        state = self.overlay.get(item_id)
        return not state.deleted if state is not None else item_id in self.index

    def showable(self, item_id: str) -> bool:
        """Whether the item may be answered: neither deleted nor marked as not available."""
        row = self.index.get(item_id)
        if row is not None:
            return bool(self.available[row])
        state = self.overlay.get(item_id)
        if state is None:
            return not self._forgot  # it may be one of those that were deleted
        return not state.deleted and self.attributes(item_id).get("available") is not False

    def attributes(self, item_id: str) -> dict[str, Any]:
        """All attributes of an item, without nulls; empty for an unknown or deleted one."""
        state = self.overlay.get(item_id)
        if state is not None and state.deleted:
            return {}
        row = self.index.get(item_id)
        base = self.row(row) if row is not None else {}
        merged = {**base, **state.attributes} if state is not None else base
        return {name: value for name, value in merged.items() if value is not None}

    def row(self, row: int) -> dict[str, Any]:
        """Attributes of a bundle row."""
        values = {name: self.items[name][row].as_py() for name in self.columns}
        return {name: value for name, value in values.items() if value not in (None, "", []) and name != ITEM_ID}

    def title(self, item_id: str) -> str:
        """Title, or the id where there is none."""
        state = self.overlay.get(item_id)
        if state is not None and state.attributes.get("title"):
            return state.attributes["title"]
        row = self.index.get(item_id)
        if row is None or "title" not in self.items.column_names:
            return item_id
        return self.items["title"][row].as_py() or item_id

    def filter_mask(self, rules: dict[str, Any]) -> np.ndarray:
        """(N,) bool, bundle items that satisfy every rule, by their present attributes.

        Raises:
            SchemaError: a rule is not understood or names an attribute that no item has.
        """
        key = orjson.dumps(rules, option=orjson.OPT_SORT_KEYS)
        mask = self._masks.get(key)
        if mask is not None:
            self._masks.move_to_end(key)
            return mask
        compiled = self.compile(rules)
        mask = np.ones(len(self.item_ids), bool)
        for name, rule in compiled.items():
            codes, values = self._distinct(name)
            mask &= np.fromiter((rule(value) for value in values), bool, len(values))[codes]
        for item_id in self.overlay:
            row = self.index.get(item_id)
            if row is not None:
                mask[row] = self.matches(item_id, compiled)
        self._masks[key] = mask
        self.masks_made += 1
        while len(self._masks) > max(1, self.bounds.masks_bytes // max(1, len(mask))):
            self._masks.popitem(last=False)
        return mask

    def _distinct(self, name: str) -> tuple[np.ndarray, list[Any]]:
        """(N,) codes of a column's values, and the value of each code: a rule is asked once a distinct value, not once an item."""
        if name not in self.items.column_names:
            return np.zeros(len(self.item_ids), np.int32), [None]
        if name not in self._codes:
            column = self.items[name]
            if pa.types.is_nested(column.type):
                places: dict[bytes, int] = {}
                keys = (orjson.dumps(value, option=orjson.OPT_SORT_KEYS) for value in column.to_pylist())
                codes = np.fromiter((places.setdefault(key, len(places)) for key in keys), np.int32, len(column))
                self._codes[name] = codes, [orjson.loads(key) for key in places]
            else:
                encoded = pa.concat_arrays(column.chunks).dictionary_encode(null_encoding="encode")
                self._codes[name] = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        return self._codes[name]

    def matches(self, item_id: str, compiled: dict[str, Rule]) -> bool:
        """Whether one item satisfies compiled rules."""
        attributes = self.attributes(item_id)
        return all(rule(attributes.get(name)) for name, rule in compiled.items())

    def compile(self, rules: dict[str, Any]) -> dict[str, Rule]:
        """Rules as predicates on one attribute value each.

        Raises:
            SchemaError: see `filter_mask`.
        """
        for name in rules:
            if name not in self.columns and name not in self._changed_names:
                names = {*self.columns, *self._changed_names}
                raise SchemaError(f"filter: expected an attribute of the items ({', '.join(sorted(names))[:300]}), got {name!r}")
        return {name: _compile(rule, f"filter.{name}") for name, rule in rules.items()}


def live_encoder(bundle: Bundle) -> Callable[[list[dict]], np.ndarray] | None:
    """Attributes of live items to vectors in the space of a bundle's content model; None where it has none."""
    content = bundle.models.get("content")
    if content is None:
        return None
    encoder = TextEncoder()
    return lambda items: content.transform(encoder.encode([item_text(a.get("title"), a.get("text"), a.get("categories")) for a in items]))


def _compile(rule: Any, where: str) -> Rule:
    if not isinstance(rule, dict):
        rule = {"in": rule} if isinstance(rule, list) else {"equals": rule}
    if not rule or any(operator not in OPERATORS for operator in rule):
        raise SchemaError(f"{where}: expected one or more of {', '.join(OPERATORS)}, got {', '.join(map(str, rule)) or 'nothing'}")
    parts = [_operator(operator, operand, f"{where}.{operator}") for operator, operand in rule.items()]
    return lambda value: all(part(value) for part in parts)


def _operator(operator: str, operand: Any, where: str) -> Rule:
    if operator == "not":
        inner = _compile(operand, where)
        return lambda value: not inner(value)
    if operator == "equals":
        return lambda value: operand in value if isinstance(value, list) else value == operand
    if operator in ("in", "any"):
        if not isinstance(operand, list) or not operand:
            raise SchemaError(f"{where}: expected a non-empty list, got {operand!r}")
        return lambda value: any(one in operand for one in (value if isinstance(value, list) else [value]))
    if not isinstance(operand, dict) or not operand or not set(operand) <= {"min", "max"}:
        raise SchemaError(f"{where}: expected an object with min and/or max, got {operand!r}")
    bounds = [operand.get("min"), operand.get("max")]
    if any(isinstance(bound, (bool, list, dict)) for bound in bounds):
        raise SchemaError(f"{where}: expected numbers or text, got {operand!r}")
    low, high = bounds

    def inside(value: Any) -> bool:
        try:
            return value is not None and (low is None or value >= low) and (high is None or value <= high)
        except TypeError:
            return False  # text against a number: the item has no comparable value

    return inside
