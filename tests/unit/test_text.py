import socket

import numpy as np
import pytest

from raysys.features.text import DIM, TextEncoder, item_text


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder()


def test_loads_without_a_network(monkeypatch):
    """A fresh load, with every connection refused."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the text encoder must not open a connection")

    from raysys.features import text

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text._model.cache_clear()
    assert TextEncoder().encode(["red lipstick"]).any()


def test_vectors_are_unit_float32(encoder):
    vectors = encoder.encode(["nail polish", "a board game for two"])
    assert vectors.shape == (2, DIM)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_near_in_meaning_is_near_in_space(encoder):
    lipstick, gloss, train = encoder.encode(["matte red lipstick", "shiny lip gloss", "wooden toy train"])
    assert lipstick @ gloss > lipstick @ train + 0.1


def test_texts_do_not_influence_each_other(encoder):
    texts = ["lip balm", "a far longer description of a shampoo for dry and damaged hair, 500 ml", "", "soap"]
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_nothing_said_gives_the_zero_vector(encoder, text):
    assert not encoder.encode([text]).any()


def test_any_script_is_finite(encoder):
    vectors = encoder.encode(["日本語", "🙂🙂", "\x00\x01", "é" * 5000])
    assert np.isfinite(vectors).all()


def test_no_texts(encoder):
    assert encoder.encode([]).shape == (0, DIM)


def test_item_text_joins_what_is_there():
    assert item_text("Toy Story", "A cowboy doll.", ["Animation", "Comedy"]) == "Toy Story. Animation, Comedy. A cowboy doll."
    assert item_text(None, None, None) == ""
    assert item_text("", None, []) == ""
    assert item_text("Title", "", None) == "Title"


def test_item_text_is_bounded():
    assert len(item_text("t", "x" * 100_000, None)) < 2_000
