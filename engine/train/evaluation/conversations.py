"""Whole conversations with a model: a person's turns are fixed, tools are simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.train.dialogue import Record
from engine.train.evaluation.generation import Generator
from engine.train.evaluation.replies import Call

__all__ = ["Conversation", "converse"]

_MAX_CALL_ROUNDS = 4  # for one question; a model that keeps calling is cut off


@dataclass(slots=True)
class Conversation:
    """A conversation under way."""

    questions: list[str]
    """What the person is still to say."""
    tools: Sequence[Record] = ()
    run_tool: Callable[[Call], str] = lambda call: '{"error": "there is no such tool"}'
    """What a tool returns, as the text of its turn."""
    messages: list[Record] = field(default_factory=list)
    """All that was said; assistant turns have `text` besides, what the model wrote, unedited."""
    call_rounds: int = 0

    def ask(self) -> bool:
        """Makes the person say the next thing; False if that was all."""
        if not self.questions:
            return False
        self.messages.append({"role": "user", "content": self.questions.pop(0)})
        self.call_rounds = 0
        return True

    @property
    def prompt(self) -> tuple[list[Record], Sequence[Record]]:
        """Messages as the template wants them, and tools."""
        keys = ("role", "content", "tool_calls", "name")
        return [{k: m[k] for k in keys if k in m} for m in self.messages], self.tools


def converse(
    generator: Generator,
    conversations: Sequence[Conversation],
    *,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Carries all conversations to their end, one assistant turn of each at a time.

    Args:
        generator: the model.
        conversations: their `messages` grow.
        on_done: called when one has ended.
    """
    active = list(conversations)
    for conversation in active:
        conversation.ask()
    while active:
        replies = generator.reply_all(conversation.prompt for conversation in active)
        going_on = []
        for conversation, reply in zip(active, replies, strict=True):
            if reply is None:  # no room in the context
                on_done()
                continue
            conversation.messages.append({**reply.message(), "text": reply.text})
            runs = conversation.call_rounds < _MAX_CALL_ROUNDS and not reply.num_broken
            if reply.calls and runs:
                conversation.call_rounds += 1
                conversation.messages += [
                    {"role": "tool", "name": call.name, "content": conversation.run_tool(call)}
                    for call in reply.calls
                ]
                going_on.append(conversation)
            elif conversation.ask():
                going_on.append(conversation)
            else:
                on_done()
        active = going_on
