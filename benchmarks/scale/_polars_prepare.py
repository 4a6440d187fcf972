"""The yardstick of prepare.py: the same output as `raysys prepare`, by one process of Polars that holds all data in memory.

    python benchmarks/scale/_polars_prepare.py DATA OUT

Reads DATA/interactions/*.parquet with integer timestamps in seconds, drops nulls and duplicates, orders, holds out each user's
last two events, numbers items by (-events, id) and users by id, and writes sequences, items and users. It checks nothing else, keeps
no quarantine, cannot resume and cannot append.
"""

import sys
from pathlib import Path

import polars as pl

POSITIVE = ["click", "play", "read", "like", "cart", "purchase"]


def main(data: str, out: str) -> None:
    target = Path(out)
    (target / "sequences").mkdir(parents=True)
    events = pl.read_parquet(f"{data}/interactions/*.parquet").drop_nulls()
    users = events.select("user_id").unique().sort("user_id").with_row_index("user_idx").with_columns(pl.col("user_idx").cast(pl.Int32))
    ids = events.select("item_id").unique().sort("item_id").with_row_index("item_row")
    # Numbers for texts first: everything after it is then sorting and counting numbers.
    events = events.join(users, on="user_id", how="left", maintain_order="left").drop("user_id")
    events = events.join(ids, on="item_id", how="left", maintain_order="left").drop("item_id")
    names = ["other", *events["event"].unique().sort().to_list()]
    codes = {name: code for code, name in enumerate(names)}
    events = events.with_columns(
        event=pl.col("event").replace_strict(codes, return_dtype=pl.Int8),
        positive=pl.col("event").is_in(POSITIVE),
    )
    events = events.unique(["user_idx", "item_row", "timestamp", "event"], keep="first", maintain_order=True)
    events = events.sort("user_idx", "timestamp", maintain_order=True)
    left = pl.len().over("user_idx") - pl.int_range(pl.len()).over("user_idx")  # 1 at a user's last event
    length = pl.len().over("user_idx")
    split = pl.when((left == 1) & (length >= 2)).then(2).when((left == 2) & (length >= 3)).then(1).otherwise(0)
    events = events.with_columns(split=split.cast(pl.Int8))
    train = events.filter(pl.col("split") == 0).group_by("item_row").agg(num_train=pl.len().cast(pl.Int64))
    items = ids.join(train, on="item_row", how="left").with_columns(pl.col("num_train").fill_null(0))
    listed = pl.read_parquet(f"{data}/items.parquet")
    missing = listed.join(ids, on="item_id", how="anti").select("item_id").with_columns(num_train=pl.lit(0, pl.Int64))
    order = pl.concat(
        [
            items.sort("num_train", "item_id", descending=[True, False]).select("item_row", "item_id", "num_train"),
            missing.sort("item_id").select(pl.lit(None, pl.UInt32).alias("item_row"), "item_id", "num_train"),
        ]
    ).with_row_index("item_idx")
    order = order.with_columns(pl.col("item_idx").cast(pl.Int32))
    rows = order.drop_nulls("item_row").sort("item_row")["item_idx"]
    sequences = events.select(
        "user_idx",
        item_idx=rows.gather(events["item_row"]),
        event="event",
        timestamp="timestamp",
        value=pl.lit(float("nan"), pl.Float32),
        positive="positive",
        split="split",
    )
    del events
    sequences = sequences.group_by("user_idx", maintain_order=True).agg(pl.all())
    sequences.write_parquet(target / "sequences" / "part-00000.parquet", compression="zstd")
    order.drop("item_row").join(listed, on="item_id", how="left", maintain_order="left").write_parquet(target / "items.parquet")
    users.write_parquet(target / "users.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
