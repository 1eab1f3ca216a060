"""How a request of the Responses API becomes a running turn: what it refers to is loaded first."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from server.agent.rounds import MAX_ROUNDS
from server.dialects.responses import ParsedResponse, to_turn
from server.errors import invalid
from server.response_object import new_id
from server.sessions import Sessions
from server.store import StoreError
from server.turn import Turn
from server.turns import Turns

__all__ = ["Begun", "Items", "begin"]

Items = list[dict[str, Any]]


def _most_new_items(parsed: ParsedResponse) -> int:
    """How many items a turn may well add: with tools of the server's own, several."""
    return len(parsed.input_items) + 1 + (2 * MAX_ROUNDS if parsed.tools.builtin else 0)


def _check_asks(history: Items) -> None:
    """Refuse a turn without input where there is nothing to answer. Raises ApiError 400."""
    last = history[-1] if history else {}
    if last.get("type") == "function_call_output" or last.get("role") == "user":
        return
    raise invalid(
        "'input' may be empty only where 'conversation.after' is a message of the user or a "
        "function_call_output, which is then answered.",
        param="input",
        code="empty_array",
    )


class Begun(NamedTuple):
    """A turn that runs, and all items it was given: history and new input."""

    turn: Turn
    items: Items


async def begin(
    parsed: ParsedResponse,
    *,
    owner: str,
    turns: Turns,
    sessions: Sessions,
    recent: Mapping[str, Items] | None = None,
    turn_id: str | None = None,
) -> Begun:
    """Load the history, claim the conversation and start the turn.

    ``recent`` are the items of responses that are not stored but known to the caller's connection.
    Raises ApiError, StoreError; nothing is left claimed then.
    """
    turn_id = turn_id or new_id("resp")
    previous_ids: list[str] = []
    history: Items = []
    conversation_id = parsed.conversation_id
    after = parsed.conversation_after
    previous_id = parsed.previous_response_id
    is_recent = previous_id is not None and previous_id in (recent or {})
    if previous_id is not None and recent and is_recent:
        history = recent[previous_id]
    elif previous_id is not None:
        previous_ids, history = await sessions.history(previous_id, owner)
    elif conversation_id is not None:
        branch = await sessions.conversations.claim(
            conversation_id,
            owner,
            turn_id,
            num_new=_most_new_items(parsed),
            after=parsed.conversation_after,
        )
        history, after = branch.items, branch.after
    try:
        if not parsed.input_items:
            _check_asks(history)
        request = to_turn(
            parsed,
            owner=owner,
            turn_id=turn_id,
            history=history,
            previous_ids=previous_ids,
            keep_history=is_recent,
            after=after,
        )
        turn = await turns.start(request)
    except BaseException:
        if conversation_id is not None:
            with contextlib.suppress(StoreError):
                await sessions.conversations.claims.release(conversation_id, turn_id)
        raise
    return Begun(turn, [*history, *parsed.input_items])
