"""Item text to vectors, by a pretrained static encoder whose weights arrive with its package.

WordLlama keeps the token vectors of a large language model, compressed to 256
dimensions (MIT licence). A text costs microseconds, so a new item has its
vector before its PUT is answered. Nothing is downloaded at run time.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

DIM = 256


def item_text(title: str | None, text: str | None, categories: Sequence[str] | None) -> str:
    """What is said about an item, as one string: title, categories, then up to 1,000 characters of text."""
    parts = [title or "", ", ".join(categories or ()), (text or "")[:1000]]
    return ". ".join(part for part in parts if part)


class TextEncoder:
    """Texts to unit vectors; the model is loaded once a process, at the first text."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, DIM) float32 of unit length; zero for an empty text."""
        vectors = np.zeros((len(texts), DIM), np.float32)
        filled = [row for row, text in enumerate(texts) if text.strip()]
        if filled:
            vectors[filled] = _model().embed([texts[row] for row in filled], norm=True)
        return np.nan_to_num(vectors)  # a text of unknown characters only has no token


def catalogue_vectors(items: pa.Table) -> np.ndarray | None:
    """(N, DIM) float32 vectors of a catalogue's title, text and categories, of unit length or zero; None where no item has any."""
    blank = [None] * items.num_rows
    columns = [items[name].to_pylist() if name in items.column_names else blank for name in ("title", "text", "categories")]
    texts = [item_text(*row) for row in zip(*columns, strict=True)]
    return TextEncoder().encode(texts) if any(texts) else None


@lru_cache(maxsize=1)
def _model() -> Any:
    from wordllama import WordLlama

    # The wheel carries the tokenizer where its loader does not look; named as the cache, the package itself has all files.
    return WordLlama.load(cache_dir=Path(str(files("wordllama"))), disable_download=True)
