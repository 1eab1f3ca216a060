"""Through HTTP under open-loop load: requests come at random moments, whatever the server does.

``PROMISE`` is what an answer must keep to count as good. Client and server share the machine's
processors. Weights are random; 8B needs 16 GB of memory for its file.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.bench.checkpoints import Shape, make_filled
from tests.bench.open_loop import Promise, Served, figures_of, offer
from tests.bench.serve import model_at, server
from tests.gpu.journal import Figures
from tests.gpu.parts import Group, Row
from tests.gpu.setting import Setting, scratch_folder
from tests.gpu.shapes import shape_of

__all__ = ["PROMISE", "groups"]

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
LOAD_S = 6
PROMISE = Promise(first_token_s=0.5, between_tokens_s=0.05, tokens=OUTPUT_TOKENS)
RATES = {"0.6b": (8, 32, 64, 128), "8b": (4, 16, 32, 64)}
MODES = {
    "bf16": (),
    "fp8": ("--quantization", "fp8"),
    "fp8-kv8": ("--quantization", "fp8", "--kv-cache-dtype", "fp8"),
}
DEFAULT = {("0.6b", "bf16"): (8, 32, 64), ("0.6b", "transformers"): (8,)}
START_S = 150


class Running(NamedTuple):
    """A server that answers."""

    setting: Setting
    url: str
    shape: Shape

    @property
    def num_output(self) -> int:
        """Tokens of an answer."""
        return self.setting.size(OUTPUT_TOKENS, 8)

    def offer(self, rate: float, requests: int) -> Served:
        """Send so many requests and wait for what becomes of them."""
        offered = offer(
            self.url,
            model_at(self.url),
            rate=rate,
            requests=requests,
            vocab=self.shape.vocab_size,
            prompt_tokens=self.setting.size(PROMPT_TOKENS, 16),
            output_tokens=self.num_output,
            patience_s=30,
        )
        return asyncio.run(offered)


def groups(setting: Setting) -> list[Group]:
    """Each server with each mode, at all rates."""
    found = []
    for model, rates in RATES.items():
        for mode in (*MODES, "transformers"):
            default = DEFAULT.get((model, mode), ())
            rows = tuple(
                Row(f"rate-{rate}", partial(_load, rate), rate in default, 12, 120)
                for rate in rates
            )
            opened = partial(_open, model=model, mode=mode)
            is_peer = mode == "transformers"
            found.append(Group(f"{model}-{mode}", rows, opened, needs_s=40, is_peer=is_peer))
    return found


@contextlib.contextmanager
def _open(setting: Setting, model: str, mode: str) -> Iterator[Running]:
    shape = shape_of(setting, model)
    options = [*MODES.get(mode, ())]
    if mode != "transformers":
        options += ["--device", setting.device.type, "--max-model-len", "1024"]
        options += ["--kv-memory", "1MiB"] if setting.dry else []
    kind = "transformers" if mode == "transformers" else "millrace"
    with tempfile.TemporaryDirectory(prefix="millrace-gpu-", dir=scratch_folder()) as name:
        checkpoint = make_filled(shape, Path(name), max_positions=4096)
        with server(kind, checkpoint, options=options, start_s=START_S) as started:
            running = Running(setting, started.url, shape)
            running.offer(4.0, 4)  # first uses are slow
            yield running


def _load(rate: int, running: Running) -> Figures:
    if running.setting.dry:
        rate = 8
    served = running.offer(rate, running.setting.size(rate * LOAD_S, 8))
    # A server that answers nothing has no figures.
    assert served.answers, f"{served.refused} refused, {served.failed} failed, none answered"
    promise = PROMISE._replace(tokens=running.num_output)
    return {"offered_per_s": rate, **figures_of(served, promise)}
