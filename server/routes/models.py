"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from engine import ModelInfo
from server.dialects.fields import unknown_model
from server.routes.bodies import json_response
from server.state import ENGINE

__all__ = ["routes"]


def _model(info: ModelInfo, created: int) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": created,
        "owned_by": "millrace",
        "max_model_len": info.max_model_len,
    }


class _Models:
    """``created`` is when this server began to offer the model, in Unix seconds."""

    def __init__(self, created: int) -> None:
        self._created = created

    async def list(self, http: web.Request) -> web.Response:
        """List the models that are served."""
        model = _model(http.app[ENGINE].info, self._created)
        return json_response({"object": "list", "data": [model]})

    async def get(self, http: web.Request) -> web.Response:
        """Describe one model."""
        info = http.app[ENGINE].info
        name = http.match_info["model"]
        if name != info.name:
            raise unknown_model(name, info.name)
        return json_response(_model(info, self._created))


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    models = _Models(int(time.time()))
    return [
        web.get("/v1/models", models.list),
        # Names on a model hub contain a slash.
        web.get("/v1/models/{model:.+}", models.get),
    ]
