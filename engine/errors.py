"""Errors the engine raises. Each says what was wrong, with which value, and what would be right."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EngineClosed",
    "EngineDied",
    "EngineError",
    "PromptTooLong",
    "RequestError",
    "TemplateError",
    "TokenizerError",
]


class EngineError(Exception):
    """Base of all errors of the engine."""


class ConfigError(EngineError, ValueError):
    """A setting is unknown, impossible, or does not fit the model or the device."""


class CheckpointError(EngineError):
    """A checkpoint is missing, incomplete, damaged or of an architecture that is not supported."""


class TokenizerError(EngineError):
    """A tokenizer is missing or damaged, or ids do not belong to it."""


class TemplateError(EngineError, ValueError):
    """The chat template refused these messages, failed, or ran out of its time limit."""


class RequestError(EngineError, ValueError):
    """A request cannot be served as it is; the caller must change it. ``param`` names the field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """The prompt leaves no room for an answer in the model's context."""


class EngineDied(EngineError):
    """The engine process ended while the request was in flight."""


class EngineClosed(EngineError):
    """The engine is shutting down, restarting or gave up restarting, and takes no new requests."""
