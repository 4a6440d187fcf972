"""Impressions and what became of them: labelled examples for training a ranker and for judging a policy off line.

Feedback belongs to an impression when it names its `recommendation_id` and item,
or, where it names none, when the user did something with an item that was shown
to them last before it. It counts inside a window after the impression; an
impression is labelled once its window is over, so a label never changes.
"""

import polars as pl

from raysys.schema import DEFAULT_EVENT_TYPES, EVENT, ITEM_ID, POSITION, RECOMMENDATION_ID, USER_ID, VALUE, EventType

IGNORED = ("impression",)
"""Events that say only that something was shown."""


def label(shown: pl.DataFrame, events: pl.DataFrame, window_s: float, event_types: dict[str, EventType] | None = None) -> pl.DataFrame:
    """Join impressions with feedback.

    Args:
        shown: impressions, a row an item (`rows.IMPRESSION_TYPES`).
        events: interactions (`rows.INTERACTION_TYPES`), at least those taken in from the first impression to the end of the last window.
        window_s: seconds after an impression in which feedback counts.
        event_types: name -> what it means; the defaults when None.

    Returns:
        `shown` with `label` (int8: 1 where a positive event followed), `event` and `value` of the strongest feedback (null: none followed),
        and `delay_s` to the first.
    """
    types = {**DEFAULT_EVENT_TYPES, **(event_types or {})}
    shown = shown.unique([RECOMMENDATION_ID, ITEM_ID], keep="first", maintain_order=True)
    feedback = events.filter(~pl.col(EVENT).is_in(IGNORED)).select(
        USER_ID, ITEM_ID, EVENT, VALUE, RECOMMENDATION_ID, pl.col("received").alias("told")
    )
    names = shown.select(RECOMMENDATION_ID, USER_ID, ITEM_ID, "received")
    named = feedback.filter(pl.col(RECOMMENDATION_ID).is_not_null()).drop(USER_ID).join(names, on=[RECOMMENDATION_ID, ITEM_ID])
    unnamed = feedback.filter(pl.col(RECOMMENDATION_ID).is_null()).drop(RECOMMENDATION_ID).sort("told")
    latest = unnamed.join_asof(
        names.filter(pl.col(USER_ID).is_not_null()).sort("received"),
        left_on="told",
        right_on="received",
        by=[USER_ID, ITEM_ID],
        strategy="backward",
        check_sortedness=False,  # both are sorted; polars cannot check it by group
    ).filter(pl.col(RECOMMENDATION_ID).is_not_null())
    columns = [RECOMMENDATION_ID, ITEM_ID, EVENT, VALUE, "told", "received"]
    delay = pl.col("told") - pl.col("received")
    found = (
        pl.concat([named.select(columns), latest.select(columns)])
        .filter(delay.is_between(0.0, window_s))
        .with_columns(
            _positive(types).alias("label"),
            pl.col(EVENT).replace_strict({name: kind.weight for name, kind in types.items()}, default=1.0).alias("weight"),
            delay.alias("delay_s"),
        )
        .sort("label", "weight", "delay_s", descending=[True, True, False])
        .group_by(RECOMMENDATION_ID, ITEM_ID, maintain_order=True)
        .agg(pl.col("label").max(), pl.col(EVENT).first(), pl.col(VALUE).first(), pl.col("delay_s").min())
    )
    labelled = shown.join(found, on=[RECOMMENDATION_ID, ITEM_ID], how="left", maintain_order="left")
    return labelled.with_columns(pl.col("label").fill_null(0).cast(pl.Int8)).sort("received", RECOMMENDATION_ID, POSITION)


def _positive(types: dict[str, EventType]) -> pl.Expr:
    plain = [name for name, kind in types.items() if kind.positive and kind.min_value is None]
    positive = pl.col(EVENT).is_in(plain)
    for name, kind in types.items():
        if kind.positive and kind.min_value is not None:
            positive = positive | ((pl.col(EVENT) == name) & (pl.col(VALUE) >= kind.min_value).fill_null(False))
    return positive.cast(pl.Int8)
