"""Puts the OpenAPI document together."""

from __future__ import annotations

from typing import Any

from server.openapi import chat, completions, conversations, events, responses, sampling, service

__all__ = ["document"]

_PARTS = (chat, completions, responses, conversations, service)


def document(version: str) -> dict[str, Any]:
    """Return the document (OpenAPI 3.2.0) of a server of this ``version``."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {**sampling.SCHEMAS, **events.SCHEMAS}
    for part in _PARTS:
        paths |= part.PATHS
        schemas |= part.SCHEMAS
    return {
        # Before 3.2 a document cannot say what the events of a stream are.
        "openapi": "3.2.0",
        "info": {
            "title": "Millrace",
            "version": version,
            "description": "An asynchronous streaming chat server with an engine of its own.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"apiKey": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Needed where the server was started with a key file.",
                },
                "apiKey": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
        },
    }
