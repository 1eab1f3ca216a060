"""Conversations in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.conversations.listing import MAX_QUERY_CHARS, MAX_SEARCHED, MAX_SEARCHED_ITEMS
from server.conversations.titles import MAX_MADE_CHARS, MAX_TITLE_CHARS
from server.openapi.items import ITEMS, METADATA
from server.openapi.parts import (
    Schema,
    array,
    boolean,
    enum,
    integer,
    json_body,
    nullable,
    obj,
    one_of,
    operation,
    ref,
    string,
)
from server.openapi.responses import ITEM_SCHEMAS, LIST_QUERY
from server.openapi.resuming import IDEMPOTENCY_KEY, query

__all__ = ["PATHS", "SCHEMAS"]

_NEW_ITEMS: Schema = {**ITEMS, "maxItems": 20}

_TITLE = string(
    "By default the beginning of the first message of the user, about "
    f"{MAX_MADE_CHARS} characters.",
    minLength=1,
    maxLength=MAX_TITLE_CHARS,
)
_FLAG = enum("true", "false", "1", "0")
_ITEM_ID = string(minLength=1, maxLength=128)

_CONVERSATION_FIELDS: dict[str, Schema] = {
    "id": string(),
    "object": enum("conversation"),
    "created_at": integer("Unix seconds."),
    "metadata": METADATA,
    "title": nullable(string()),
    "updated_at": integer("Unix seconds; when it last changed."),
    "head": nullable(
        string("The item that the branch shown ends at; null where there are no items.")
    ),
}
_MATCH = obj({"item_id": string(), "text": string("The text around the words.")})


def _list(element: Schema, optional: dict[str, Schema] | None = None) -> Schema:
    return obj(
        {
            "object": enum("list"),
            "data": array(element),
            "first_id": nullable(string()),
            "last_id": nullable(string()),
            "has_more": boolean(),
        },
        optional,
    )


def _in_tree(schema: Schema) -> Schema:
    """Return the schema of an item that says what it comes after."""
    parent = nullable(string("The item that this one comes after; null at a root."))
    return {
        **schema,
        "properties": {**schema["properties"], "parent_id": parent},
        "required": [*schema["required"], "parent_id"],
    }


SCHEMAS: dict[str, Schema] = {
    "Conversation": obj(_CONVERSATION_FIELDS),
    "ConversationList": _list(ref("Conversation")),
    "FoundConversation": obj({**_CONVERSATION_FIELDS, "match": nullable(_MATCH)}),
    "FoundConversationList": _list(
        ref("FoundConversation"),
        {"searched": integer("Only so many of the newest conversations were looked at.", 0)},
    ),
    "ConversationRequest": obj(
        {},
        {
            "title": nullable(_TITLE),
            "metadata": nullable(METADATA),
            "items": nullable({**_NEW_ITEMS, "minItems": 0}),
        },
    ),
    "ConversationUpdate": {
        **obj(
            {},
            {
                "title": _TITLE,
                "metadata": METADATA,
                "head": {**_ITEM_ID, "description": "Show the branch that ends at this item."},
                "descend": boolean("Show it down to the newest leaf after `head` instead."),
            },
        ),
        "anyOf": [{"required": ["title"]}, {"required": ["metadata"]}, {"required": ["head"]}],
        "dependentRequired": {"descend": ["head"]},
    },
    "ConversationFork": obj(
        {},
        {
            "after": nullable({**_ITEM_ID, "description": "The last item. Default: the head."}),
            "title": nullable({**_TITLE, "description": "Default: that of the conversation."}),
        },
    ),
    "NewItems": obj({"items": _NEW_ITEMS}),
    "DeletedConversation": obj(
        {"id": string(), "object": enum("conversation.deleted"), "deleted": {"const": True}}
    ),
    **{f"Tree{name}": _in_tree(schema) for name, schema in ITEM_SCHEMAS.items()},
    "TreeItemList": _list(one_of(*(ref(f"Tree{name}") for name in ITEM_SCHEMAS))),
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


def _optional_body(name: str) -> dict[str, Any]:
    return {"required": False, "content": {"application/json": {"schema": ref(name)}}}


_MAKE_ERRORS = (400, 409, 413, 415, 422, 429, 503)
_SEARCH_TEXT = f"""With `query` those whose title and messages, taken together, have all its words
(case, accents and width do not matter), each with the text around the words, or null where the
title alone has them. Only the {MAX_SEARCHED} newest conversations are looked at, and no more than
{MAX_SEARCHED_ITEMS} items beyond the first: `searched` says how many conversations that were, where
older ones were left out."""
_QUERY = query("query", string(minLength=1, maxLength=MAX_QUERY_CHARS), "Words to look for.")

PATHS: dict[str, dict[str, Any]] = {
    "/v1/conversations": {
        "get": _operation(
            "List the caller's conversations by their last change, or search in them",
            {
                200: json_body(
                    one_of(ref("ConversationList"), ref("FoundConversationList")),
                    "Conversations.",
                )
            },
            errors=(400, 503),
            text=_SEARCH_TEXT,
            parameters=(_QUERY, *LIST_QUERY),
        ),
        "post": {
            **_operation(
                "Create a conversation",
                _CONVERSATION,
                errors=_MAKE_ERRORS,
                parameters=(IDEMPOTENCY_KEY,),
            ),
            "requestBody": _optional_body("ConversationRequest"),
        },
    },
    "/v1/conversations/{id}": {
        "get": _operation(
            "Return a conversation", _CONVERSATION, errors=(404, 503), parameters=(_ID,)
        ),
        "post": _operation(
            "Replace a conversation's title or metadata, or choose the branch that is shown",
            _CONVERSATION,
            errors=_BODY_ERRORS,
            body=ref("ConversationUpdate"),
            parameters=(_ID,),
        ),
        "delete": _operation(
            "Delete a conversation with its items",
            {200: json_body(ref("DeletedConversation"), "It is deleted.")},
            errors=(404, 503),
            parameters=(_ID,),
        ),
    },
    "/v1/conversations/{id}/fork": {
        "post": {
            **_operation(
                "Create a conversation with copies of this one's path to an item",
                _CONVERSATION,
                errors=(*_MAKE_ERRORS, 404),
                text="The copies have ids of their own; `call_id`s stay as they are.",
                parameters=(_ID, IDEMPOTENCY_KEY),
            ),
            "requestBody": _optional_body("ConversationFork"),
        },
    },
    "/v1/conversations/{id}/items": {
        "get": _operation(
            "List the items of the branch that is shown, or of all branches",
            {200: json_body(one_of(ref("ItemList"), ref("TreeItemList")), "Items.")},
            errors=(400, 404, 503),
            parameters=(
                _ID,
                query("tree", _FLAG, "All items in the order of adding, with `parent_id`."),
                *LIST_QUERY,
            ),
        ),
        "post": _operation(
            "Add items after the head",
            {200: json_body(ref("ItemList"), "The new items.")},
            errors=(*_BODY_ERRORS, 409),
            text="Refused (409) while a response is being made in the conversation.",
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
            "Delete an item, or all that comes after it too",
            _CONVERSATION,
            errors=(400, 404, 409, 503),
            text="""Without `subtree` what came after the item then comes after its parent. A head
that is deleted moves to the item's parent; with `subtree` to the newest leaf that is left below it.
Refused (409) while a response is being made in the conversation.""",
            parameters=(_ID, _ITEM, query("subtree", _FLAG, "Delete what comes after it too.")),
        ),
    },
}
