"""WebSocket frames that are almost right (RFC 6455, section 5), mutated from a seed."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib

from tests.fuzz.mutations import BYTES, TREE

__all__ = ["CREATE", "HANDSHAKE", "frame", "mutated_frames"]

HANDSHAKE = (
    "GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    "Authorization: Bearer {key}\r\n"
)
CREATE = {
    "type": "response.create",
    "model": "pebble",
    "input": "Hello",
    "max_output_tokens": 16,
    "stream_id": "a",
    "store": False,
}
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(
    payload: bytes,
    *,
    opcode: int = TEXT,
    final: bool = True,
    reserved: int = 0,
    masked: bool = True,
    length: int | None = None,
) -> bytes:
    """Return one frame; ``length`` claims another length than the payload has."""
    size = len(payload) if length is None else length
    head = bytes([final << 7 | reserved << 4 | opcode])
    bit = masked << 7
    if size < 126:
        head += bytes([bit | size])
    elif size < 1 << 16:
        head += bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", size)
    if not masked:
        return head + payload
    mask = os.urandom(4)
    whole = mask * (len(payload) // 4 + 1)
    return head + mask + bytes(a ^ b for a, b in zip(payload, whole, strict=False))


def _message(rng: random.Random) -> bytes:
    body = json.loads(json.dumps(CREATE))
    for _ in range(rng.choice((0, 0, 1, 2))):
        body = rng.choice(TREE)(rng, body)
    if rng.random() < 0.1:
        body = {"type": "response.cancel", "response_id": rng.choice(("", "x", None, 5))}
    data = json.dumps(body).encode("utf-8", "replace")
    return rng.choice(BYTES)(rng, data) if rng.random() < 0.15 else data


def mutated_frames(rng: random.Random) -> tuple[str, bytes]:
    """Return a description and what goes over an open WebSocket."""
    kind = rng.choice(
        ("message", "message", "opcode", "reserved", "unmasked", "fragments", "bytes", "length",
         "control", "close", "deflate", "noise", "not utf-8", "interleaved", "many")
    )  # fmt: skip
    data = _message(rng)
    match kind:
        case "opcode":
            sent = frame(data, opcode=rng.choice((3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 0)))
        case "reserved":
            sent = frame(data, reserved=rng.randint(1, 7))
        case "unmasked":
            sent = frame(data, masked=False)
        case "fragments":
            sent = _fragments(rng, data, rng.choice((2, 5, len(data) + 3)))
        case "bytes":
            sent = _fragments(rng, data, len(data))
        case "length":
            claimed = rng.choice((1 << 62, (1 << 64) - 1, 1 << 31, 1 << 33, 9 << 20, 70_000))
            sent = frame(data, length=claimed)
        case "control":
            sent = frame(
                os.urandom(rng.choice((0, 5, 125, 126, 70_000))),
                opcode=rng.choice((PING, PONG, CLOSE)),
                final=rng.random() < 0.7,
            )
        case "close":
            code = rng.choice((0, 999, 1000, 1004, 1005, 1006, 1015, 2999, 5000, 65535))
            sent = frame(struct.pack(">H", code) + rng.choice((b"", b"\xff", b"x" * 123)), opcode=8)
            sent += frame(data)
        case "deflate":
            bomb = zlib.compressobj(wbits=-15)
            packed = bomb.compress(b" " * (16 << 20)) + bomb.flush(zlib.Z_SYNC_FLUSH)
            sent = frame(packed[:-4], reserved=4)
        case "noise":
            sent = os.urandom(rng.randint(1, 300))
        case "not utf-8":
            sent = frame(rng.choice((b"\xff\xfe{}", b"\xed\xa0\x80", b'{"type": "\xc3')))
        case "interleaved":
            half = len(data) // 2
            sent = frame(data[:half], final=False) + frame(b"x", opcode=PING)
            sent += rng.choice((frame(data), frame(data[half:], opcode=0)))
        case "many":
            sent = frame(data) * rng.randint(2, 60)
        case _:
            sent = frame(data)
    return kind, sent


def _fragments(rng: random.Random, data: bytes, count: int) -> bytes:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(count - 1))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    last = len(parts) - 1
    return b"".join(
        frame(part, opcode=TEXT if at == 0 else 0, final=at == last)
        for at, part in enumerate(parts)
    )
