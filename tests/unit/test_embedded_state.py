"""What only the state in LMDB can break."""

import lmdb
import pytest

from raysys.errors import StateError
from raysys.events.embedded_state import EmbeddedState
from raysys.events.state import StateLimits


def test_a_state_of_another_format_is_refused_and_says_what_to_do(tmp_path):
    folder = str(tmp_path / "state")
    EmbeddedState(folder, StateLimits()).close()
    EmbeddedState(folder, StateLimits()).close()
    with lmdb.open(folder, max_dbs=20) as environment, environment.begin(write=True) as txn:
        offsets = environment.open_db(b"offsets", txn=txn)
        txn.delete(b"\0format", db=offsets)
        txn.put(b"seg-1", b"\0" * 8, db=offsets)
    with pytest.raises(StateError, match="remove the folder, the log rebuilds it"):
        EmbeddedState(folder, StateLimits())


def test_a_full_store_says_so_and_the_rest_stays_readable(tmp_path):
    from raysys.events.log import Span

    state = EmbeddedState(str(tmp_path / "state"), StateLimits(max_bytes=1 << 20))
    record = {"kind": "item", "attributes": {"text": "x" * 5000}}
    with pytest.raises(StateError, match="cannot commit"):
        for n in range(1000):
            state.apply([{**record, "item_id": f"i{n}"}], Span("s", n, n + 1))
    assert state.applied("s") > 50 and state.item("i0").attributes["text"].startswith("x")
    state.close()
