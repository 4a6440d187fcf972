"""The bytes of a log segment: frames of length u32, crc32 u32, payload (JSON).

Knows bytes, not files. A frame that is not intact ends what can be read, unless
an intact one follows it: then it is damage in the middle, and only it is skipped.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import orjson

FRAME = struct.Struct("<II")
RECORD_START = b'{"'
"""How every payload begins; finds the next frame behind damage."""
FILLER = b'{"kind":"erased"'


def pack(record: dict[str, Any]) -> bytes:
    """One record as a frame."""
    return framed(orjson.dumps(record))


def framed(payload: bytes) -> bytes:
    """A payload with its head."""
    return FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def filler(size: int) -> bytes:
    """A frame of exactly `size` bytes that holds nothing; what an erased record is overwritten with."""
    room = size - FRAME.size - len(FILLER) - 1
    assert room >= 0, "a record that names a user is longer than the filler"
    return framed(FILLER + b" " * room + b"}")


def frame_at(content: bytes, at: int) -> int:
    """Size of the intact frame at a position, head included; 0 where there is none, or not all of it."""
    if at + FRAME.size > len(content):
        return 0
    length, checksum = FRAME.unpack_from(content, at)
    first = at + FRAME.size
    if length == 0 or first + length > len(content) or zlib.crc32(memoryview(content)[first : first + length]) != checksum:
        return 0
    return FRAME.size + length


def payload(content: bytes, at: int, size: int) -> dict[str, Any]:
    """The record in the intact frame at a position."""
    return orjson.loads(memoryview(content)[at + FRAME.size : at + size])


def next_frame(content: bytes, at: int) -> int | None:
    """Position of the first intact frame behind a damaged one at `at`; None where nothing intact follows."""
    found = content.find(RECORD_START, at + FRAME.size + 1)
    while found >= 0:
        if frame_at(content, found - FRAME.size):
            return found - FRAME.size
        found = content.find(RECORD_START, found + 1)
    return None


def intact(content: bytes) -> Iterator[tuple[int, int]]:
    """(position, size) of every intact frame; damage between them is skipped."""
    at: int | None = 0
    while at is not None:
        if size := frame_at(content, at):
            yield at, size
            at += size
        else:
            at = next_frame(content, at)


def intact_end(content: bytes) -> int:
    """Position after the last intact frame."""
    end = 0
    for at, size in intact(content):
        end = at + size
    return end
