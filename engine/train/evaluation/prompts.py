"""Twenty fixed prompts, whose answers the model card shows as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.train.dialogue import Record
from engine.train.evaluation.conversations import Conversation, converse
from engine.train.evaluation.generation import Generator
from engine.train.evaluation.replies import Call
from engine.train.evaluation.sums import CALCULATOR, run_calculator

__all__ = ["PROMPTS", "Prompt", "Transcript", "answer_prompts"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a person says, turn by turn, and the tools there are."""

    title: str
    questions: Sequence[str]
    tools: Sequence[Record] = ()


@dataclass(frozen=True, slots=True)
class Transcript:
    """A prompt's conversation."""

    title: str
    tools: Sequence[str]
    turns: Sequence[tuple[str, str]]
    """Who speaks (`user`, `assistant`, `tool`), and the text, the model's unedited."""


def _tool(name: str, description: str, required: str, optional: str = "") -> Record:
    """A tool schema; parameters are words, with `:type` behind those that are no strings."""
    properties: Record = {}
    for word in (*required.split(), *optional.split()):
        field, _, kind = word.partition(":")
        properties[field] = {"type": kind or "string"}
    names = [word.partition(":")[0] for word in required.split()]
    return {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": names},
    }


_WEATHER = _tool("get_weather", "Get the weather forecast for a city", "city", "date")
_FIND = _tool("find_restaurants", "Find restaurants in a city", "city", "cuisine")
_RESERVE = _tool(
    "reserve_table", "Reserve a table at a restaurant", "restaurant date time guests:integer"
)
_SEARCH = _tool("search_products", "Search the shop for products", "query", "max_price:number")

_RESULTS: dict[str, Record] = {
    "get_weather": {"forecast": "light rain", "temperature_c": 7},
    "find_restaurants": {
        "results": [
            {"name": "Trattoria Luna", "rating": 4.6, "price": "moderate"},
            {"name": "Da Pino", "rating": 4.2, "price": "cheap"},
        ]
    },
    "reserve_table": {"status": "confirmed", "reservation_id": "R4821"},
    "search_products": {
        "results": [
            {"name": "Norda Slim", "price": 45, "rating": 4.4, "feature": "a padded strap"},
            {"name": "Cargo Mate", "price": 58, "rating": 4.1, "feature": "many pockets"},
        ]
    },
}
"""What the simulated tools return, whatever they are asked: the answer must say this."""


def _run_tool(call: Call) -> str:
    if call.name == CALCULATOR["name"]:
        return run_calculator(call)
    return json.dumps(_RESULTS.get(call.name, {"error": f"there is no tool {call.name}"}))


_BAGS = """Recommend a laptop bag for at most $60.
1. Hama Lite, $25, rated 3.9, light
2. Norda Slim, $45, rated 4.4, with a padded strap
3. Cargo Mate, $58, rated 4.1, with many pockets
4. Atelier Pro, $129, rated 4.8, made of leather"""

_NOTICE = """Summarize in one sentence:

The library on Mill Street closes for repairs from 3 to 14 June. Books that are due in these weeks \
may be returned until 21 June without a fee. The reading room of the town hall stays open, and the \
children's hour moves there on Wednesdays at 4 pm."""

_CALL = """Summarize this conversation.

User: Hi, I need a taxi from the station to the airport.
Assistant: When would you like to leave?
User: Tomorrow at 6 in the morning, two people.
Assistant: Your taxi is booked for 6 am tomorrow. The price is $38.
User: Great, thanks."""

_VOWELS = '''Complete this Python function:

def count_vowels(text):
    """Returns how many vowels a text has."""'''

PROMPTS = (
    Prompt("Small talk", ["Hello! How are you?"]),
    Prompt("Small talk about the weekend", ["What should I do this weekend?", "I like nature."]),
    Prompt("Something interesting", ["Tell me something interesting."]),
    Prompt("A fact", ["What is the capital of France?"]),
    Prompt("A name, remembered", ["Hi! My name is Mirela.", "What is my name?"]),
    Prompt("A thing told, remembered", ["My dog is called Bruno.", "What is my dog called?"]),
    Prompt(
        "Booking a table",
        [
            "I want to go out for dinner in Oslo. I like Italian food.",
            "Trattoria Luna sounds good. Please reserve a table for 4 people.",
            "On Friday at 7 pm.",
            "Thank you!",
        ],
        [_FIND, _RESERVE],
    ),
    Prompt("Weather", ["What will the weather be in Oslo on Friday?"], [_WEATHER, _SEARCH]),
    Prompt("Weather, asked otherwise", ["Do I need an umbrella in Porto?"], [_WEATHER]),
    Prompt("Recommending from a list", [_BAGS]),
    Prompt("Recommending with a tool", ["I need a laptop bag under $60."], [_SEARCH, _WEATHER]),
    Prompt("A gift", ["What is a good gift for my brother? He likes painting."]),
    Prompt("Summary of a notice", [_NOTICE]),
    Prompt("Summary of a conversation", [_CALL]),
    Prompt("A Python function", [_VOWELS]),
    Prompt("中文闲聊", ["你好！你是谁？", "今天天气不错，你喜欢做什么？"]),
    Prompt("What nobody can know", ["Which numbers will win the lottery next Saturday?"]),
    Prompt("No tool for it", ["Please order me a pizza."], [_WEATHER, CALCULATOR]),
    Prompt("A percentage with the calculator", ["What is 17% of 2,340?"], [CALCULATOR, _WEATHER]),
    Prompt(
        "A sum in words with the calculator",
        ["I buy 12 notebooks at 3.45 dollars each. What do I pay?"],
        [_SEARCH, CALCULATOR],
    ),
)
"""Fixed: changing one makes cards incomparable."""


def answer_prompts(
    generator: Generator, *, on_done: Callable[[], None] = lambda: None
) -> list[Transcript]:
    """Has the model answer all prompts, greedily and without a system prompt."""
    conversations = [
        Conversation(list(prompt.questions), prompt.tools, _run_tool) for prompt in PROMPTS
    ]
    converse(generator, conversations, on_done=on_done)
    return [
        Transcript(
            prompt.title,
            [tool["name"] for tool in prompt.tools],
            [(m["role"], str(m.get("text", m["content"]))) for m in conversation.messages],
        )
        for prompt, conversation in zip(PROMPTS, conversations, strict=True)
    ]
