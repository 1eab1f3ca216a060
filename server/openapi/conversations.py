"""Conversations in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.openapi.items import ITEMS, METADATA
from server.openapi.parts import (
    Schema,
    enum,
    integer,
    json_body,
    nullable,
    obj,
    operation,
    ref,
    string,
)
from server.openapi.responses import LIST_QUERY
from server.openapi.resuming import IDEMPOTENCY_KEY

__all__ = ["PATHS", "SCHEMAS"]

_NEW_ITEMS: Schema = {**ITEMS, "maxItems": 20}

SCHEMAS: dict[str, Schema] = {
    "Conversation": obj(
        {
            "id": string(),
            "object": enum("conversation"),
            "created_at": integer("Unix seconds."),
            "metadata": METADATA,
        }
    ),
    "ConversationRequest": obj(
        {},
        {"metadata": nullable(METADATA), "items": nullable({**_NEW_ITEMS, "minItems": 0})},
    ),
    "ConversationUpdate": obj({"metadata": METADATA}),
    "NewItems": obj({"items": _NEW_ITEMS}),
    "DeletedConversation": obj(
        {"id": string(), "object": enum("conversation.deleted"), "deleted": {"const": True}}
    ),
}


def _path(name: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
        "description": text,
    }


_ID = _path("id", "A conversation's id.")
_ITEM = _path("item", "An item's id.")
_CONVERSATION = {200: json_body(ref("Conversation"), "The conversation.")}
_BODY_ERRORS = (400, 404, 413, 415, 503)


def _operation(summary: str, responses: dict[int, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return operation(summary, "Conversations", responses, **more)


PATHS: dict[str, dict[str, Any]] = {
    "/v1/conversations": {
        "post": {
            **_operation(
                "Create a conversation",
                _CONVERSATION,
                errors=(400, 409, 413, 415, 422, 429, 503),
                parameters=(IDEMPOTENCY_KEY,),
            ),
            "requestBody": {
                "required": False,
                "content": {"application/json": {"schema": ref("ConversationRequest")}},
            },
        }
    },
    "/v1/conversations/{id}": {
        "get": _operation(
            "Return a conversation", _CONVERSATION, errors=(404, 503), parameters=(_ID,)
        ),
        "post": _operation(
            "Replace a conversation's metadata",
            _CONVERSATION,
            errors=_BODY_ERRORS,
            body=ref("ConversationUpdate"),
            parameters=(_ID,),
        ),
        "delete": _operation(
            "Delete a conversation with its items",
            {200: json_body(ref("DeletedConversation"), "It is deleted.")},
            errors=(404, 409, 503),
            parameters=(_ID,),
        ),
    },
    "/v1/conversations/{id}/items": {
        "get": _operation(
            "List items",
            {200: json_body(ref("ItemList"), "Items.")},
            errors=(400, 404, 503),
            parameters=(_ID, *LIST_QUERY),
        ),
        "post": _operation(
            "Add items at the end",
            {200: json_body(ref("ItemList"), "The new items.")},
            errors=_BODY_ERRORS,
            body=ref("NewItems"),
            parameters=(_ID,),
        ),
    },
    "/v1/conversations/{id}/items/{item}": {
        "get": _operation(
            "Return an item",
            {200: json_body(ref("Item"), "The item.")},
            errors=(404, 503),
            parameters=(_ID, _ITEM),
        ),
        "delete": _operation(
            "Delete an item", _CONVERSATION, errors=(404, 503), parameters=(_ID, _ITEM)
        ),
    },
}
