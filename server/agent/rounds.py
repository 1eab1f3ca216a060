"""The tool loop of one turn: what the model called is run, and the model goes on with the results.

No I/O and no clock but the tools' own; the turn feeds it items and runs what it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from server.agent.history import items_to_messages
from server.agent.tools import BUILTIN_TOOLS, error_output, run_tool
from server.events import Event, OutputItemAdded, OutputItemDone
from server.request import ToolOptions, TurnRequest
from server.response_object import function_output_item, new_id

__all__ = ["MAX_ROUNDS", "Results", "ToolRounds"]

MAX_ROUNDS = 8
"""Most times that the model is asked again in one turn; the last time it has no tools."""


class Results(NamedTuple):
    """What the tools said to the calls of one round."""

    items: list[dict[str, Any]]
    request: TurnRequest | None
    """What the model is asked next; None: calls are left for the client to answer."""

    def events(self, first_index: int) -> list[Event]:
        """Return the events that show the items, the first at ``first_index``."""
        events: list[Event] = []
        for index, item in enumerate(self.items, start=first_index):
            events.append(OutputItemAdded(output_index=index, item=item))
            events.append(OutputItemDone(output_index=index, item=item))
        return events


class ToolRounds:
    """Runs a turn's calls of the server's own tools, as often as the model makes some."""

    def __init__(self, request: TurnRequest) -> None:
        self._request = request
        self._rounds = 0
        self._calls = 0
        self._known = [one["function"]["name"] for one in request.tools.functions]

    def run(self, items: Sequence[dict[str, Any]], *, again: bool = False) -> Results | None:
        """Run the calls among the items of a round; None: there are none for this server.

        ``again``: another server was about to run them, and may have done so.
        """
        own = self._own(items)
        if not own:
            return None
        outputs = [
            function_output_item(new_id("fco"), call["call_id"], self._answer(call, again))
            for call in own
        ]
        return self._results(items, outputs)

    def repeat(
        self, items: Sequence[dict[str, Any]], outputs: list[dict[str, Any]]
    ) -> Results | None:
        """Come to the state after a round that another server ran, with what its tools said.

        None: the calls among the items are not those that were answered.
        """
        own = self._own(items)
        if [call["call_id"] for call in own] != [output["call_id"] for output in outputs]:
            return None
        for call in own:
            self._refusal(call)
        return self._results(items, outputs)

    def _results(self, items: Sequence[dict[str, Any]], outputs: list[dict[str, Any]]) -> Results:
        self._rounds += 1
        every = len(outputs) == len(_calls(items))
        return Results(outputs, self._next([*items, *outputs]) if every else None)

    def _own(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        builtin = self._request.tools.builtin
        # A name that nobody has is answered here too, unless it may be meant for the client.
        own = [call for call in _calls(items) if call["name"] in builtin or self._is_ours(call)]
        return own if builtin else []

    def _is_ours(self, call: dict[str, Any]) -> bool:
        return call["name"] not in self._known and len(self._known) == len(
            self._request.tools.builtin
        )

    def _answer(self, call: dict[str, Any], again: bool) -> str:
        refusal = self._refusal(call)
        if refusal is not None:
            return error_output(refusal)
        kind = self._request.tools.builtin[call["name"]]
        if again and not BUILTIN_TOOLS[kind].repeatable:
            return error_output(
                "the server that ran this call went away; whether it was done is not known"
            )
        return run_tool(kind, call["arguments"])

    def _refusal(self, call: dict[str, Any]) -> str | None:
        """Say why a call is not run; one that is counts."""
        if call["name"] not in self._request.tools.builtin:
            return f"there is no tool {call['name']!r}; there are: {', '.join(self._known)}"
        limit = self._request.tools.max_calls
        if limit is not None and self._calls >= limit:
            return f"no more than {limit} calls are allowed; answer without"
        self._calls += 1
        return None

    def _next(self, items: list[dict[str, Any]]) -> TurnRequest:
        tools = self._request.tools
        spent = tools.max_calls is not None and self._calls >= tools.max_calls
        if spent or self._rounds >= MAX_ROUNDS:
            tools = ToolOptions(choice="none")
        elif tools.choice == "required":
            # That one call must be made has been seen to.
            tools = msgspec.structs.replace(tools, choice="auto", name=None)
        self._request = msgspec.structs.replace(
            self._request,
            messages=[*(self._request.messages or []), *items_to_messages(items)],
            tools=tools,
        )
        return self._request


def _calls(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that are complete."""
    calls = (item for item in items if item["type"] == "function_call")
    return [call for call in calls if call["status"] == "completed"]
