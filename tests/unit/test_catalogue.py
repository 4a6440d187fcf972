"""Filters over a catalogue; what it keeps in memory has bounds, and what was forgotten is not shown by mistake."""

import numpy as np
import pyarrow as pa

from raysys.events.state import ItemState
from raysys.serve.catalogue import Catalogue, CatalogueBounds

ITEMS = pa.table({"item_id": [f"b{row}" for row in range(100)], "year": list(range(100)), "num_train": [1] * 100})


def catalogue(**bounds) -> Catalogue:
    return Catalogue(ITEMS, lambda items: np.ones((len(items), 4), np.float32), CatalogueBounds(**bounds))


def put(kept: Catalogue, *names: str, deleted: bool = False) -> None:
    first = kept.sequence + 1
    kept.apply([(name, ItemState({} if deleted else {"year": 7, "mood": "new"}, deleted, first + at)) for at, name in enumerate(names)])


def test_the_latest_live_items_stay_and_the_oldest_are_forgotten_whole():
    kept = catalogue(live_items=3)
    put(kept, "n0", "n1", "n2")
    put(kept, "n0")  # changed again: not the oldest any more
    put(kept, "n3", "b1")
    assert list(kept.live) == ["n2", "n0", "n3"] and kept.live_matrix[1].shape == (3, 4)
    assert set(kept.overlay) == {"n2", "n0", "n3", "b1"} and not kept.known("n1") and kept.known("b1")


def test_more_at_once_than_can_be_kept():
    kept = catalogue(live_items=3)
    put(kept, *(f"n{at}" for at in range(10)))
    assert list(kept.live) == ["n7", "n8", "n9"] and len(kept.overlay) == 3 and len(kept.live_matrix[0]) == 3


def test_deleted_items_have_a_bound_too_and_none_is_shown_again():
    kept = catalogue(live_items=3)
    assert kept.showable("never heard of"), "it may have events"
    put(kept, "n0", "b1")
    put(kept, "n0", "n1", "n2", "n3", "n4", "b1", deleted=True)
    assert len(kept.overlay) == 4, "three, and the bundle's own"
    assert not any(kept.showable(name) for name in ("n0", "n1", "n2", "n3", "n4", "b1")) and kept.showable("b2")
    put(kept, "n4")
    assert kept.showable("n4") and "n4" in kept.live


def test_filter_masks_are_bounded_by_bytes_and_those_asked_for_last_stay():
    kept = catalogue(masks_bytes=250)
    for year in (1, 2, 1, 3):
        kept.filter_mask({"year": year})
    made = kept.masks_made
    assert made == 3
    kept.filter_mask({"year": 1})
    assert kept.masks_made == made
    kept.filter_mask({"year": 2})
    assert kept.masks_made == made + 1
    tiny = catalogue(masks_bytes=1)
    assert [tiny.filter_mask({"year": 4}).sum() for _ in range(2)] == [1, 1] and tiny.masks_made == 1


def test_attributes_that_only_live_items_have_can_be_filtered_by():
    kept = catalogue()
    put(kept, "n0")
    assert kept.filter_mask({"mood": "new"}).sum() == 0 and kept.matches("n0", kept.compile({"mood": "new"}))


def test_filters_are_as_asking_every_item_alone():
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "item_id": [f"b{row}" for row in range(300)],
            "year": [None if row % 7 == 0 else int(rng.integers(5)) for row in range(300)],
            "kind": [None if row % 5 == 0 else str(rng.integers(3)) for row in range(300)],
            "tags": [None if row % 11 == 0 else [str(tag) for tag in rng.integers(0, 4, row % 3)] for row in range(300)],
            "price": rng.random(300),
        }
    )
    kept = Catalogue(pa.concat_tables([table[:100], table[100:]]))
    put(kept, "b3", "n0")
    for rules in (
        {"year": 3},
        {"year": {"not": {"equals": 3}}},
        {"kind": ["1", "2"], "price": {"range": {"min": 0.2, "max": 0.9}}},
        {"tags": {"any": ["1", "3"]}},
        {"tags": {"not": {"equals": "2"}}, "year": {"in": [1, 7]}},
        {"mood": {"not": {"equals": "new"}}},
    ):
        compiled = kept.compile(rules)
        expected = [kept.matches(item_id, compiled) for item_id in kept.item_ids]
        assert kept.filter_mask(rules).tolist() == expected and 0 < sum(expected) < 300, rules
