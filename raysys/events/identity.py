"""User ids as keyed hashes: what bundles and tombstones hold instead of the id itself.

The key comes from `RAYSYS_USER_KEY`, else from a file of this machine that is
made once. Training and serving must share it; `key_id` lets a bundle say which
key it was written with, without giving the key away.
"""

import functools
import hashlib
import hmac
import os
import secrets

from raysys import storage
from raysys.errors import ConfigError

KEY_VARIABLE = "RAYSYS_USER_KEY"
KEY_BYTES = 16
"""Length of a user key; at a billion users two of them collide with probability 1e-21."""


def user_key(user_id: str) -> bytes:
    """HMAC-SHA256 of the id under the secret key, cut to KEY_BYTES."""
    return hmac.digest(_secret(), user_id.encode(), "sha256")[:KEY_BYTES]


def key_id() -> str:
    """Eight hex digits that tell keys apart."""
    return hashlib.sha256(b"raysys key id" + _secret()).hexdigest()[:8]


def sign(content: bytes) -> str:
    """Hex HMAC-SHA256 of a receipt under the same key."""
    return hmac.digest(_secret(), b"receipt" + content, "sha256").hex()


def _secret() -> bytes:
    text = os.environ.get(KEY_VARIABLE)
    if text is not None:
        if len(text) < 16:
            raise ConfigError(f"{KEY_VARIABLE}: expected at least 16 characters, got {len(text)}")
        return text.encode()
    return _file_secret(str(storage.home() / "secrets" / "user.key"))


@functools.lru_cache(maxsize=8)
def _file_secret(path: str) -> bytes:
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
