"""The engine on a GPU: steps of many requests on long contexts, long prompts, memory; and peers.

``decode-N@C``: one token each for N requests with C tokens of context, whose keys and values are
random; tokens a second and the mean time of a step, tokens counted as they reach the host.
``read-C``: the first token of a prompt of C tokens. ``memory``: GiB of the weights, and the KiB
that a token takes in the cache. Weights are random. Peers: transformers' continuous batching with
CUDA graphs, and its ``generate`` with a static cache, compiled; both in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.gpu.engines import MODES, Ours, Peer, open_ours, open_peer
from tests.gpu.journal import Figures
from tests.gpu.parts import Group, Row
from tests.gpu.setting import Setting
from tests.gpu.shapes import GPU_SHAPES

__all__ = ["PEERS", "groups"]

BATCHES = (1, 16, 64, 256)
CONTEXTS = (128, 1024, 8192, 32_768)
"""128 is what the peers read in reasonable time for many requests."""
READS = (2048, 32_768, 102_400)
PEERS: dict[str, Callable[[Peer, int, int], Figures]] = {
    "transformers": Peer.batching,
    "transformers-eager": Peer.batching_eager,
    "transformers-compiled": Peer.compiled,
}
DEFAULT = {
    ("8b", "bf16"): ("memory", "decode-1@1024", "decode-256@128", "decode-64@1024", "read-2048",
                     "read-32768"),
    ("8b", "transformers"): ("decode-1@1024", "decode-256@128"),
    ("8b", "fp8"): ("memory", "decode-1@1024", "decode-256@128", "read-2048"),
    ("8b", "fp8-kv8"): ("memory", "decode-1@1024", "decode-256@128", "decode-64@1024"),
    ("0.6b", "bf16"): ("decode-1@1024", "decode-256@128"),
    ("8b", "transformers-compiled"): ("decode-1@1024",),
}  # fmt: skip
"""In the order of their worth, for a run whose time ends."""


def groups(setting: Setting) -> list[Group]:
    """Every model with every mode and peer."""
    others = [(model, mode) for model in GPU_SHAPES for mode in (*MODES, *PEERS)]
    return [
        _peers(model, mode) if mode in PEERS else _ours(model, mode)
        for model, mode in dict.fromkeys((*DEFAULT, *others))
    ]


def _ours(model: str, mode: str) -> Group:
    rows = _our_rows(DEFAULT.get((model, mode), ()))
    return Group(f"{model}-{mode}", rows, partial(open_ours, model=model, mode=mode), needs_s=25)


def _peers(model: str, peer: str) -> Group:
    default = DEFAULT.get((model, peer), ())
    rows = tuple(
        Row(name, partial(_of_peer, PEERS[peer], streams, context), name in default, 15, 240)
        for streams in BATCHES
        for context in CONTEXTS
        if (name := f"decode-{streams}@{context}")
    )
    opened = partial(open_peer, model=model)
    return Group(f"{model}-{peer}", rows, opened, needs_s=20, is_peer=True)


def _our_rows(default: tuple[str, ...]) -> tuple[Row, ...]:
    rows = [Row("memory", Ours.memory, "memory" in default, 1)]
    for streams in BATCHES:
        for context in CONTEXTS:
            name = f"decode-{streams}@{context}"
            rows.append(Row(name, partial(_decode, streams, context), name in default, 5))
    for length in READS:
        name = f"read-{length}"
        rows.append(Row(name, partial(_read, length), name in default, 5))
    return tuple(rows)


def _decode(streams: int, context: int, ours: Ours) -> Figures:
    return ours.decode(streams, context)


def _read(length: int, ours: Ours) -> Figures:
    return ours.read(length)


def _of_peer(
    measure: Callable[[Peer, int, int], Figures], streams: int, context: int, peer: Peer
) -> Figures:
    return measure(peer, streams, context)
