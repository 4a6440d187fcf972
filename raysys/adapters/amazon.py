"""Amazon reviews, JSON lines, plain or gzip, in the layouts of 2014/2018 and of 2023.

Reviews: reviewerID, asin, overall, unixReviewTime; or user_id, parent_asin, rating, timestamp (ms).
Meta file beside it (a name that begins with `meta`): asin or parent_asin, title, categories, description, brand/store, price.
"""

import gzip
import html
import json
import re
from collections.abc import Iterator
from typing import Any

import polars as pl

from raysys import storage
from raysys.adapters.contract import ContractWriter
from raysys.errors import SchemaError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
LAYOUTS = {
    "2014/2018": {"user_id": "reviewerID", "item_id": "asin", "value": "overall", "timestamp": "unixReviewTime"},
    "2023": {"user_id": "user_id", "item_id": "parent_asin", "value": "rating", "timestamp": "timestamp"},
}
FLUSH_ROWS = 200_000
MAX_TEXT = 2_000
"""Characters of a description that are kept."""


def read(src: str, writer: ContractWriter) -> None:
    """Read a review file, or a folder with review files and perhaps a `meta*` file.

    Raises:
        SchemaError: no such file, a line that is not JSON, or a field that is missing.
    """
    folder = src if storage.is_dir(src) else src.rsplit("/", 1)[0]
    names = [name for name in storage.list_dir(folder) if name.lower().endswith(SUFFIXES)]
    meta = [name for name in names if name.lower().startswith("meta")]
    reviews = [name for name in names if name not in meta] if src == folder else [src.rsplit("/", 1)[1]]
    if not reviews or not all(name.lower().endswith(SUFFIXES) for name in reviews):
        found = ", ".join(storage.list_dir(folder)[:8]) or "an empty folder"
        raise SchemaError(f"{src}: expected reviews as JSON lines (*{', *'.join(SUFFIXES)}), found {found}")
    items: set[str] = set()
    for name in reviews:
        _read_reviews(storage.join(folder, name), items, writer)
    if src != folder:
        # In a folder of many categories only the meta file of the same category is meant.
        stem = reviews[0].split(".")[0].removesuffix("_5")
        meta = [name for name in meta if stem.removeprefix("reviews_") in name]
    rows = [row for name in meta for row in _read_meta(storage.join(folder, name), items)]
    if rows:
        writer.add_table("items", pl.DataFrame(rows, schema=META_SCHEMA).unique("item_id", keep="last", maintain_order=True))
    else:
        writer.notes.append("no meta file beside the reviews: items have no titles")


def read_json_lines(uri: str) -> Iterator[tuple[int, dict]]:
    """Number and object of every line; streams, gzip understood.

    Raises:
        SchemaError: a line is not a JSON object, or the file is not gzip as its name says.
    """
    filesystem, path = storage.resolve(uri)
    number = 1
    with filesystem.open_input_stream(path, compression=None) as raw:
        lines = gzip.GzipFile(fileobj=raw) if uri.endswith(".gz") else raw
        try:
            for line in _split_lines(lines):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError("not an object")
                    yield number, value
                number += 1
        except (ValueError, OSError, EOFError) as error:
            found = " ".join(str(error).split())[:120]
            raise SchemaError(f"{uri}: line {number}: expected one JSON object a line, found: {found}") from None


def _split_lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _read_reviews(uri: str, items: set[str], writer: ContractWriter) -> None:
    layout: dict[str, str] | None = None
    rows: list[tuple[str, str, int, float]] = []
    for number, review in read_json_lines(uri):
        if layout is None:
            known = (fields for fields in LAYOUTS.values() if fields["user_id"] in review and fields["item_id"] in review)
            layout = next(known, None)
            if layout is None:
                expected = " or ".join(", ".join(fields.values()) for fields in LAYOUTS.values())
                raise SchemaError(f"{uri}: line {number}: expected the fields {expected}, found {', '.join(list(review)[:8])}")
        rows.append(_review(uri, number, review, layout))
        items.add(rows[-1][1])
        if len(rows) >= FLUSH_ROWS:
            _flush(rows, writer)
    if layout is None:
        raise SchemaError(f"{uri}: expected reviews, found an empty file")
    _flush(rows, writer)


def _review(uri: str, number: int, review: dict, layout: dict[str, str]) -> tuple[str, str, int, float]:
    try:
        user, item = review[layout["user_id"]], review[layout["item_id"]]
        stamp, value = int(review[layout["timestamp"]]), float(review[layout["value"]])
    except KeyError as error:
        raise SchemaError(f"{uri}: line {number}: expected a field {error}, found {', '.join(list(review)[:8])}") from None
    except (TypeError, ValueError):
        found = {name: review[layout[name]] for name in ("timestamp", "value")}
        raise SchemaError(f"{uri}: line {number}: expected numbers in {layout['timestamp']} and {layout['value']}, found {found}") from None
    # The layout of 2023 counts milliseconds; seconds of this century stay below 1e11.
    return str(user), str(item), stamp // 1000 if stamp > 100_000_000_000 else stamp, value


def _flush(rows: list[tuple[str, str, int, float]], writer: ContractWriter) -> None:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "value": pl.Float32}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    writer.add_interactions(frame.select("user_id", "item_id", "timestamp", event=pl.lit("rating"), value="value"))
    rows.clear()


META_SCHEMA: dict[str, Any] = {
    "item_id": pl.String,
    "title": pl.String,
    "text": pl.String,
    "categories": pl.List(pl.String),
    "brand": pl.String,
    "price": pl.Float64,
}


def _read_meta(uri: str, items: set[str]) -> Iterator[dict]:
    for _, meta in read_json_lines(uri):
        item = str(meta.get("parent_asin") or meta.get("asin") or "")
        if item in items:
            yield {
                "item_id": item,
                "title": _clean(meta.get("title")),
                "text": (_clean(meta.get("description")) or "")[:MAX_TEXT] or None,
                "categories": _categories(meta),
                "brand": _clean(meta.get("brand") or meta.get("store")),
                "price": _price(meta.get("price")),
            }


def _clean(value: Any) -> str | None:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
    return " ".join(html.unescape(re.sub(r"<[^>]{0,200}>", " ", text)).split()) or None


def _categories(meta: dict) -> list[str]:
    # 2014 nests paths, 2018 calls the one path `category`, 2023 has a flat list.
    paths = meta.get("categories") or meta.get("category") or []
    flat = [name for path in paths for name in (path if isinstance(path, list) else [path])] if isinstance(paths, list) else [paths]
    return list(dict.fromkeys(html.unescape(str(name)).strip() for name in flat if str(name).strip()))


def _price(value: Any) -> float | None:
    match = re.search(r"\d+(?:,\d{3})*(?:\.\d+)?", str(value if value is not None else ""))
    return float(match[0].replace(",", "")) if match else None
