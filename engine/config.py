"""The engine's settings: frozen; "auto" is resolved where model and device are known."""

from __future__ import annotations

from enum import Enum

import msgspec

from engine.errors import ConfigError

__all__ = [
    "DEFAULT_MODEL",
    "Device",
    "Dtype",
    "EngineConfig",
    "KvCacheDtype",
    "Quantization",
    "parse_bytes",
]

DEFAULT_MODEL = "pebble"
"""Name of the bundled model, which lies in ``engine/assets``."""


class Dtype(Enum):
    """Storage type of weights, and of the KV cache. ``auto`` takes the checkpoint's own."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Quantization(Enum):
    """What the weight matrices become at loading; ``none`` leaves them as the checkpoint has them.

    The embedding and the head stay as they are.
    """

    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class KvCacheDtype(Enum):
    """What keys and values are stored as.

    ``auto`` is the weights' type or, where the checkpoint was made for it and the device can, 8-bit
    floats (e4m3). ``fp8`` is those: half the memory of 16 bits, so twice the tokens.
    """

    AUTO = "auto"
    FP8 = "fp8"


class Device(Enum):
    """Where the model runs. ``auto`` takes a GPU if there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine process is started with.

    Raises ConfigError on a value that can never work, whatever the model.
    """

    model: str = DEFAULT_MODEL
    """A checkpoint directory, a name on the Hugging Face hub, or the bundled model's name."""
    served_name: str | None = None
    """Name under which the API shows the model; default: the last part of ``model``."""
    dtype: Dtype = Dtype.AUTO
    quantization: Quantization = Quantization.NONE
    device: Device = Device.AUTO
    kv_cache_dtype: KvCacheDtype = KvCacheDtype.AUTO
    batch_invariant: bool = False
    """Kernels that give a request the same bits alone, in any batch and in any chunking. Those of a
    CPU do so anyway; on a GPU it costs time."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; None: what the checkpoint states."""
    kv_memory_bytes: int | None = None
    """Size of the KV cache; None: from what the device has free."""
    max_num_tokens: int | None = None
    """Most tokens computed in one step, over all requests; None: 2048 on a CPU; on a GPU up to
    8192, as many as take no longer than 50 ms there."""
    max_num_seqs: int | None = None
    """Most requests that run at once; None: 256 on a CPU; on a GPU up to 512, by its memory."""
    block_size: int = 16
    """Tokens in a KV block."""
    num_threads: int | None = None
    """Compute threads on a CPU; None: from the cores this process may use."""
    prefix_cache: bool = True
    steps_ahead: int | None = None
    """Steps that are launched before the tokens of the one before them are known, 0 or 1; None: 1
    on a GPU, 0 on a CPU, which has nobody to compute the next step while this one is read."""
    cuda_graphs: bool = True
    """On a GPU, record steps without prompts once and replay them."""
    chunk_tokens: int | None = None
    """Most prompt tokens of one request in one step; None: up to ``max_num_tokens``."""
    adapter: str | None = None
    """Directory of a LoRA adapter in PEFT's format, merged into the weights at loading."""
    shared_prompt_tokens: int | None = None
    """Most prompt tokens of a step that other tenants' answers wait for; None: an eighth of
    ``max_num_tokens``."""
    prompt_cost: float = 1.0
    """What a computed prompt token counts where tenants share the engine."""
    cached_cost: float = 0.1
    """What a prompt token from the prefix cache counts."""
    decode_cost: float = 2.0
    """What a generated token counts."""
    check_integrity: bool = False
    """Check the block pool's books whenever the engine is idle (debugging, tests)."""

    def __post_init__(self) -> None:
        _at_least("block_size", self.block_size, 1)
        for name in ("prompt_cost", "cached_cost", "decode_cost"):
            if not 0 <= (cost := getattr(self, name)) < 1e6:
                raise ConfigError(f"{name} is {cost}; it must be at least 0 and below 1000000")
        if not self.decode_cost:
            # What is never charged could go on for ever before another's turn comes.
            raise ConfigError("decode_cost is 0; it must be more")
        for name in (
            "max_model_len", "max_num_tokens", "max_num_seqs", "num_threads", "chunk_tokens",
            "shared_prompt_tokens",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None:
                _at_least(name, value, 1)
        if self.steps_ahead not in (None, 0, 1):
            raise ConfigError(f"steps_ahead is {self.steps_ahead}; it must be 0 or 1")
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size is {self.block_size}; it must be a power of two")
        if self.kv_memory_bytes is not None:
            _at_least("kv_memory_bytes", self.kv_memory_bytes, 1)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """Read a size such as ``512MiB``, ``4G`` or ``1073741824``.

    Raises ConfigError when the text is not a positive number with an optional unit.
    """
    body = text.strip().lower().removesuffix("b")
    number = body.rstrip("kmgi")
    unit = body[len(number) :]
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{text!r} is not a size; write for example 512MiB, 4GiB or 1073741824")
    return size
