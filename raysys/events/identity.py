"""User ids as keyed hashes: what bundles and tombstones hold instead of the id itself, and log and lake where that is asked for.

The key comes from `RAYSYS_USER_KEY`, else from a file of this machine that is
made once. Training and serving must share it; `key_id` lets a bundle say which
key it was written with, without giving the key away.
"""

import contextlib
import functools
import hashlib
import hmac
import os
import secrets
from typing import Any

import orjson

from raysys import storage
from raysys.errors import ConfigError

KEY_VARIABLE = "RAYSYS_USER_KEY"
PSEUDONYM = "user-key:"
KEY_BYTES = 16
"""Length of a user key; at a billion users two of them collide with probability 1e-21."""


def user_key(user_id: str) -> bytes:
    """HMAC-SHA256 of the id under the secret key, cut to KEY_BYTES; a pseudonym carries it already."""
    if user_id.startswith(PSEUDONYM) and len(user_id) == len(PSEUDONYM) + 2 * KEY_BYTES:
        with contextlib.suppress(ValueError):
            return bytes.fromhex(user_id[len(PSEUDONYM) :])
    return hmac.digest(_secret(), user_id.encode(), "sha256")[:KEY_BYTES]


def pseudonym(user_id: str) -> str:
    """A name that stands for the id wherever a user id stands, and tells nobody without the key whose it is."""
    return PSEUDONYM + user_key(user_id).hex()


def key_id() -> str:
    """Eight hex digits that tell keys apart."""
    return hashlib.sha256(b"raysys key id" + _secret()).hexdigest()[:8]


def signed(body: dict[str, Any]) -> dict[str, Any]:
    """A receipt: the body with a `signature`, a hex HMAC-SHA256 of it (JSON, keys sorted) under the same key."""
    return {**body, "key_id": key_id(), "signature": _signature({**body, "key_id": key_id()})}


def is_genuine(receipt: dict[str, Any]) -> bool:
    """Whether a receipt was signed with this key and not changed since."""
    body = {name: value for name, value in receipt.items() if name != "signature"}
    return hmac.compare_digest(str(receipt.get("signature")), _signature(body))


def _signature(body: dict[str, Any]) -> str:
    return hmac.digest(_secret(), b"receipt" + orjson.dumps(body, option=orjson.OPT_SORT_KEYS), "sha256").hex()


def _secret() -> bytes:
    text = os.environ.get(KEY_VARIABLE)
    if text is not None:
        if len(text) < 16:
            raise ConfigError(f"{KEY_VARIABLE}: expected at least 16 characters, got {len(text)}")
        return text.encode()
    return _file_secret(os.environ.get("RAYSYS_HOME", ""), os.environ.get("HOME", ""))


@functools.lru_cache(maxsize=8)
def _file_secret(*homes: str) -> bytes:
    """The key in the file under the home of raysys, which follows from these variables; looked up for every hash, so kept."""
    path = str(storage.home() / "secrets" / "user.key")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        temporary = f"{path}.tmp-{secrets.token_hex(6)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, this never replaces the key of a faster process
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    with open(path, "rb") as file:
        return file.read().strip()
