"""What outlives a turn: stored responses and conversations, each visible to its owner only.

A completed or cut turn adds its input and output items to its conversation; a cancelled one adds
what was produced; a failed one adds nothing, so that sending it again does not double the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec

from server.conversations.store import MAX_ITEMS, Conversations
from server.errors import ApiError, invalid, not_found
from server.journals import Journals
from server.paging import Item
from server.request import TurnRequest
from server.store import Store, StoreError, reaching

__all__ = ["ResponseRecord", "Sessions"]


class ResponseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A stored response with what it was made from."""

    owner: str
    response: dict[str, Any]
    input_items: list[Item]
    previous_ids: list[str]
    """The responses it follows on, first to last."""


_encode = msgspec.json.Encoder().encode
_decode_response = msgspec.json.Decoder(ResponseRecord).decode


class Sessions:
    """Stored responses, and the conversations. Every method may raise StoreError.

    What does not exist, or belongs to another owner, is an ApiError 404 either way.
    """

    def __init__(self, store: Store, journals: Journals, *, retention_s: int) -> None:
        self._store = store
        self._redis = store.redis
        self._journals = journals
        self._retention_s = retention_s
        self.conversations = Conversations(store, journals, retention_s=retention_s)

    # Turns (TurnKeeper)

    async def begin(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a response that begins."""
        if request.store:
            await self._save(request, response)

    async def end(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a response's end, add its items to its conversation and let others use that."""
        if request.store:
            await self._save(request, response)
        if request.conversation_id is not None:
            await self._end_in_conversation(request.conversation_id, request, response)

    async def begin_again(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a response that runs, where the store has lost it."""
        if request.store:
            await self._save(request, response, only_new=True)

    async def adopt(self, request: TurnRequest, turn_id: str) -> None:
        """Hold the conversation of a turn that was taken over from a dead server."""
        if request.conversation_id is not None:
            await self.conversations.claims.adopt(request.conversation_id, turn_id)

    async def _end_in_conversation(
        self, conversation_id: str, request: TurnRequest, response: dict[str, Any]
    ) -> None:
        try:
            if response["status"] != "failed":
                items = [*request.input_items, *response["output"]]
                await self.conversations.append(conversation_id, items, request.conversation_after)
        except ApiError as error:
            # Somebody filled the conversation while the turn ran.
            raise StoreError(error.message) from error
        finally:
            await self.conversations.claims.release(conversation_id, response["id"])

    async def _save(
        self, request: TurnRequest, response: dict[str, Any], *, only_new: bool = False
    ) -> None:
        record = ResponseRecord(
            owner=request.owner,
            response=response,
            input_items=request.input_items,
            previous_ids=request.previous_ids,
        )
        with reaching():
            await self._redis.set(
                self._key(response["id"]), _encode(record), ex=self._retention_s, nx=only_new
            )

    # Responses

    async def response(self, response_id: str, owner: str) -> ResponseRecord:
        """Return a stored response; one whose server died has failed."""
        with reaching():
            data = await self._redis.get(self._key(response_id))
        record = _decode_response(data) if data else None
        if record is None:
            self._journals.replicas.check_doubt()
        if record is None or record.owner != owner:
            raise not_found(f"There is no response '{response_id}'.", code="response_not_found")
        if record.response["status"] == "in_progress":
            last = await self._journals.settle(response_id)
            if last is not None:
                response = cast(dict[str, Any], getattr(last.event, "response", record.response))
                record = msgspec.structs.replace(record, response=response)
        return record

    async def delete_response(self, response_id: str, owner: str) -> None:
        """Delete a response and its event log."""
        await self.response(response_id, owner)
        with reaching():
            await self._redis.delete(self._key(response_id))
        await self._journals.delete(response_id)

    async def history(self, response_id: str, owner: str) -> tuple[list[str], list[Item]]:
        """Return the ids and the items of a chain of responses that ends with ``response_id``."""
        try:
            last = await self.response(response_id, owner)
        except ApiError:
            raise _no_previous(response_id) from None
        if last.response["status"] == "in_progress":
            raise invalid(
                f"The response '{response_id}' is not complete yet.",
                param="previous_response_id",
                code="previous_response_in_progress",
            )
        ids = last.previous_ids
        records = [*await self._records(ids, owner), last]
        items = [item for record in records for item in _record_items(record)]
        if len(items) > MAX_ITEMS:
            raise invalid(
                f"The chain of responses has {len(items)} items; at most {MAX_ITEMS} are allowed.",
                param="previous_response_id",
            )
        return [*ids, response_id], items

    async def _records(self, ids: Sequence[str], owner: str) -> list[ResponseRecord]:
        if not ids:
            return []
        with reaching():
            found = await self._redis.mget([self._key(one) for one in ids])
        records = []
        for response_id, data in zip(ids, found, strict=True):
            record = _decode_response(data) if data else None
            if record is None or record.owner != owner:
                raise _no_previous(response_id)
            records.append(record)
        return records

    def _key(self, response_id: str) -> str:
        return self._store.key("response", response_id)


def _record_items(record: ResponseRecord) -> list[Item]:
    return [*record.input_items, *record.response["output"]]


def _no_previous(response_id: str) -> ApiError:
    return invalid(
        f"There is no response '{response_id}' to follow on.",
        param="previous_response_id",
        code="previous_response_not_found",
    )
