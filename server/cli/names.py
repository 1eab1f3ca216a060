"""Values that options take, by name: the engine's, repeated so that ``--help`` loads none of it."""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "DeviceName",
    "DtypeName",
    "KvCacheDtypeName",
    "LogLevel",
    "MethodName",
    "QuantizationName",
]


class LogLevel(StrEnum):
    """How much the server logs."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class DtypeName(StrEnum):
    """Names of engine.Dtype."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class MethodName(StrEnum):
    """Names of engine.train.tuning.plan.Method."""

    AUTO = "auto"
    FULL = "full"
    LORA = "lora"


class QuantizationName(StrEnum):
    """Names of engine.Quantization."""

    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class KvCacheDtypeName(StrEnum):
    """Names of engine.KvCacheDtype."""

    AUTO = "auto"
    FP8 = "fp8"


class DeviceName(StrEnum):
    """Names of engine.Device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
