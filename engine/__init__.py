"""Token ids in, token ids out: the inference engine behind Millrace.

These names are all that the server may use. Importing this package loads no torch: the engine's
compute lives in a process of its own, which ``EngineClient`` starts and speaks to.
"""

from __future__ import annotations

from engine.client import EngineClient, EngineState, RequestStream
from engine.config import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    Quantization,
    parse_bytes,
)
from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineClosed,
    EngineDied,
    EngineError,
    PromptTooLong,
    RequestError,
    TemplateError,
    TokenizerError,
)
from engine.hub import resolve_model
from engine.tokenizer import TextStream, Tokenizer
from engine.types import (
    Delta,
    EngineStats,
    FinishReason,
    ModelInfo,
    Recoveries,
    Request,
    SamplingDefaults,
    SamplingParams,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "DEFAULT_MODEL",
    "CheckpointError",
    "ConfigError",
    "Delta",
    "Device",
    "Dtype",
    "EngineClient",
    "EngineClosed",
    "EngineConfig",
    "EngineDied",
    "EngineError",
    "EngineState",
    "EngineStats",
    "FinishReason",
    "KvCacheDtype",
    "ModelInfo",
    "PromptTooLong",
    "Quantization",
    "Recoveries",
    "Request",
    "RequestError",
    "RequestStream",
    "SamplingDefaults",
    "SamplingParams",
    "TemplateError",
    "TextStream",
    "TokenLogprobs",
    "Tokenizer",
    "TokenizerError",
    "Usage",
    "parse_bytes",
    "resolve_model",
]
