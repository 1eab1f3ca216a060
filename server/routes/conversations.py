"""/v1/conversations: conversations and their items."""

from __future__ import annotations

from aiohttp import web

from server.dialects.fields import Fields
from server.dialects.items import read_items, read_metadata
from server.errors import invalid
from server.routes.bodies import json_response, read_json
from server.routes.paging import cut_page
from server.routes.retried import once
from server.state import OWNER, SESSIONS

__all__ = ["routes"]

MAX_NEW_ITEMS = 20
"""As in OpenAI's API."""


async def create(http: web.Request) -> web.StreamResponse:
    """Create a conversation, with up to 20 items to begin with."""
    fields = Fields(await read_json(http) if http.can_read_body else {})
    fields.refuse_unknown(("metadata", "items"))
    metadata = read_metadata(fields)
    items = _new_items(fields) if fields.raw("items") else []
    conversations, owner = http.app[SESSIONS].conversations, http[OWNER]

    async def run(conversation_id: str | None) -> web.StreamResponse:
        record = await conversations.create(owner, metadata, items, conversation_id)
        return json_response(record.body())

    async def again(conversation_id: str) -> web.StreamResponse:
        return json_response((await conversations.get(conversation_id, owner)).body())

    async def begun(conversation_id: str) -> bool:
        return await conversations.exists(conversation_id)

    return await once(http, run, again, prefix="conv", begun=begun)


async def retrieve(http: web.Request) -> web.Response:
    """Return a conversation without its items."""
    record = await http.app[SESSIONS].conversations.get(http.match_info["id"], http[OWNER])
    return json_response(record.body())


async def update(http: web.Request) -> web.Response:
    """Replace a conversation's metadata."""
    fields = Fields(await read_json(http))
    fields.refuse_unknown(("metadata",))
    fields.required("metadata")
    record = await http.app[SESSIONS].conversations.update(
        http.match_info["id"], http[OWNER], read_metadata(fields)
    )
    return json_response(record.body())


async def delete(http: web.Request) -> web.Response:
    """Delete a conversation with its items."""
    conversation_id = http.match_info["id"]
    await http.app[SESSIONS].conversations.delete(conversation_id, http[OWNER])
    return json_response({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


async def list_items(http: web.Request) -> web.Response:
    """List items: ``after``, ``limit``, ``order``."""
    items = await http.app[SESSIONS].conversations.items(http.match_info["id"], http[OWNER])
    return json_response(cut_page(http, items))


async def add_items(http: web.Request) -> web.Response:
    """Add up to 20 items at the end."""
    fields = Fields(await read_json(http))
    fields.refuse_unknown(("items",))
    fields.required("items")
    items = _new_items(fields)
    await http.app[SESSIONS].conversations.add_items(http.match_info["id"], http[OWNER], items)
    return json_response(
        {
            "object": "list",
            "data": items,
            "first_id": items[0]["id"],
            "last_id": items[-1]["id"],
            "has_more": False,
        }
    )


async def retrieve_item(http: web.Request) -> web.Response:
    """Return one item."""
    item = await http.app[SESSIONS].conversations.item(
        http.match_info["id"], http.match_info["item"], http[OWNER]
    )
    return json_response(item)


async def delete_item(http: web.Request) -> web.Response:
    """Delete one item and return the conversation."""
    conversations, conversation_id = http.app[SESSIONS].conversations, http.match_info["id"]
    await conversations.delete_item(conversation_id, http.match_info["item"], http[OWNER])
    record = await conversations.get(conversation_id, http[OWNER])
    return json_response(record.body())


def _new_items(fields: Fields) -> list[dict[str, object]]:
    if isinstance(fields.raw("items"), str):
        raise invalid("'items' must be an array of items.", param="items", code="invalid_type")
    fields.array("items", max_len=MAX_NEW_ITEMS)
    return read_items(fields, "items")


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    one, items = "/v1/conversations/{id}", "/v1/conversations/{id}/items"
    return [
        web.post("/v1/conversations", create),
        web.get(one, retrieve, allow_head=False),
        web.post(one, update),
        web.delete(one, delete),
        web.get(items, list_items, allow_head=False),
        web.post(items, add_items),
        web.get(items + "/{item}", retrieve_item, allow_head=False),
        web.delete(items + "/{item}", delete_item),
    ]
