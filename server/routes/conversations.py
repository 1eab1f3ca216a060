"""/v1/conversations: conversations and their items."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from server.conversations.listing import MAX_QUERY_CHARS
from server.conversations.records import ConversationRecord
from server.conversations.titles import MAX_TITLE_CHARS
from server.dialects.fields import Fields
from server.dialects.items import read_items, read_metadata
from server.errors import invalid
from server.routes.bodies import json_response, read_json
from server.routes.paging import cut_page, page_query, query_flag
from server.routes.retried import once
from server.state import OWNER, SESSIONS

__all__ = ["routes"]

MAX_NEW_ITEMS = 20
"""As in OpenAI's API."""
MAX_ID_CHARS = 128


async def create(http: web.Request) -> web.StreamResponse:
    """Create a conversation, with up to 20 items to begin with."""
    fields = Fields(await read_json(http) if http.can_read_body else {})
    fields.refuse_unknown(("title", "metadata", "items"))
    title, metadata = _title(fields), read_metadata(fields)
    items = _new_items(fields) if fields.raw("items") else []
    conversations, owner = http.app[SESSIONS].conversations, http[OWNER]

    async def make(conversation_id: str | None) -> ConversationRecord:
        return await conversations.create(owner, metadata, items, conversation_id, title=title)

    return await _made_once(http, make)


async def fork(http: web.Request) -> web.StreamResponse:
    """Create a conversation with copies of one's path to an item."""
    fields = Fields(await read_json(http) if http.can_read_body else {})
    fields.refuse_unknown(("after", "title"))
    after, title = fields.string("after", empty=False, max_len=MAX_ID_CHARS), _title(fields)
    conversations, owner = http.app[SESSIONS].conversations, http[OWNER]

    async def make(fork_id: str | None) -> ConversationRecord:
        return await conversations.fork(
            http.match_info["id"], owner, after=after, title=title, fork_id=fork_id
        )

    return await _made_once(http, make)


async def _made_once(
    http: web.Request, make: Callable[[str | None], Awaitable[ConversationRecord]]
) -> web.StreamResponse:
    conversations, owner = http.app[SESSIONS].conversations, http[OWNER]

    async def run(conversation_id: str | None) -> web.StreamResponse:
        return json_response((await make(conversation_id)).body())

    async def again(conversation_id: str) -> web.StreamResponse:
        return json_response((await conversations.get(conversation_id, owner)).body())

    async def begun(conversation_id: str) -> bool:
        return await conversations.exists(conversation_id)

    return await once(http, run, again, prefix="conv", begun=begun)


async def list_all(http: web.Request) -> web.Response:
    """List the caller's conversations, or with ``query`` those that have its words."""
    listing, owner = http.app[SESSIONS].conversations.listing, http[OWNER]
    query = http.query.get("query")
    if query is None:
        return json_response((await listing.page(owner, **page_query(http))).body())
    if len(query) > MAX_QUERY_CHARS:
        raise invalid(
            f"'query' has {len(query)} characters; at most {MAX_QUERY_CHARS} are allowed.",
            param="query",
            code="string_above_max_length",
        )
    return json_response(await listing.search(owner, query, **page_query(http)))


async def retrieve(http: web.Request) -> web.Response:
    """Return a conversation without its items."""
    record = await http.app[SESSIONS].conversations.get(http.match_info["id"], http[OWNER])
    return json_response(record.body())


async def update(http: web.Request) -> web.Response:
    """Replace a conversation's title or metadata, or choose the branch that is shown."""
    fields = Fields(await read_json(http))
    fields.refuse_unknown(("title", "metadata", "head", "descend"))
    if not any(fields.given(name) for name in ("title", "metadata", "head")):
        raise invalid(
            "At least one of 'title', 'metadata' and 'head' must be given.",
            code="missing_required_parameter",
        )
    descend = fields.boolean("descend", False)
    if descend and not fields.given("head"):
        raise invalid("'descend' needs 'head'.", param="descend", code="invalid_value")
    record = await http.app[SESSIONS].conversations.update(
        http.match_info["id"],
        http[OWNER],
        metadata=read_metadata(fields) if fields.given("metadata") else None,
        title=_title(fields),
        head=fields.string("head", empty=False, max_len=MAX_ID_CHARS),
        descend=descend,
    )
    return json_response(record.body())


async def delete(http: web.Request) -> web.Response:
    """Delete a conversation with its items."""
    conversation_id = http.match_info["id"]
    await http.app[SESSIONS].conversations.delete(conversation_id, http[OWNER])
    return json_response({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


async def list_items(http: web.Request) -> web.Response:
    """List the items of the branch that is shown, or with ``tree`` those of all branches."""
    conversations = http.app[SESSIONS].conversations
    listed = conversations.tree if query_flag(http, "tree") else conversations.items
    items = await listed(http.match_info["id"], http[OWNER])
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
    """Delete one item, or with ``subtree`` all after it too, and return the conversation."""
    record = await http.app[SESSIONS].conversations.delete_item(
        http.match_info["id"],
        http.match_info["item"],
        http[OWNER],
        subtree=query_flag(http, "subtree"),
    )
    return json_response(record.body())


def _title(fields: Fields) -> str | None:
    return fields.string("title", empty=False, max_len=MAX_TITLE_CHARS)


def _new_items(fields: Fields) -> list[dict[str, object]]:
    if isinstance(fields.raw("items"), str):
        raise invalid("'items' must be an array of items.", param="items", code="invalid_type")
    fields.array("items", max_len=MAX_NEW_ITEMS)
    return read_items(fields, "items")


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    one, items = "/v1/conversations/{id}", "/v1/conversations/{id}/items"
    return [
        web.get("/v1/conversations", list_all, allow_head=False),
        web.post("/v1/conversations", create),
        web.get(one, retrieve, allow_head=False),
        web.post(one, update),
        web.delete(one, delete),
        web.post(one + "/fork", fork),
        web.get(items, list_items, allow_head=False),
        web.post(items, add_items),
        web.get(items + "/{item}", retrieve_item, allow_head=False),
        web.delete(items + "/{item}", delete_item),
    ]
