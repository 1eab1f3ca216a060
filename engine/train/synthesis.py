"""Dialogues made by a program: what a small model must learn to copy rather than to remember.

Found dialogues reuse a few hundred functions and values, which a small model learns by heart. Here
nearly every function, argument and value is new, so that only copying from the context predicts it.
Sources: `made_calls` (tool calls), `made_sums` (arithmetic with a calculator), `made_recall` (facts
that a person told), `made_choice` (recommendations from a list), `made_repeat` and `made_forms`
(nothing but copying: word for word, and by name into JSON; they are what teaches it).
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator

from engine.train.dialogue import Record
from engine.train.sums import make_sum

__all__ = ["MADE_SOURCES", "make_records"]

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a small, friendly assistant.",
    "You are a helpful assistant. Use the tools when they are needed.",
    "Answer the user. Call a tool if it helps.",
)
_VERBS = (
    "find", "get", "search", "list", "create", "add", "remove", "update", "send", "book",
    "cancel", "check", "open", "close", "start", "stop", "set", "read", "write", "show", "move",
    "copy", "order", "rent", "buy", "sell", "play", "track", "count", "convert",
)  # fmt: skip
_NOUNS = (
    "flight", "hotel", "room", "car", "ticket", "order", "product", "song", "movie", "book",
    "recipe", "message", "email", "event", "reminder", "note", "file", "photo", "account",
    "invoice", "payment", "table", "parcel", "train", "bus", "taxi", "doctor", "appointment",
    "garden", "lamp", "door", "alarm", "timer", "report", "team", "task", "customer", "house",
    "ship", "museum",
)  # fmt: skip
_FIELDS = (
    "name", "title", "city", "place", "origin", "destination", "date", "day", "time",
    "category", "colour", "size", "brand", "artist", "author", "genre", "topic", "owner",
    "sender", "receiver", "subject", "text", "query", "code", "number", "amount", "price",
    "quantity", "guests", "nights", "rating", "language", "currency", "unit", "priority",
    "status", "address", "street", "phone",
)  # fmt: skip
_WHOLE = frozenset(
    ("number", "amount", "price", "quantity", "guests", "nights", "rating", "priority")
)
_DAYS = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today",
    "tomorrow",
)  # fmt: skip
_ONSETS = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m",
    "n", "p", "pr", "qu", "r", "s", "sh", "sl", "st", "t", "th", "tr", "v", "w", "z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ee", "ia", "oo", "ou")
_CODAS = ("", "", "", "l", "n", "r", "s", "t", "nd", "rk", "m", "x")
_GOODS = (
    "laptop bag", "backpack", "desk lamp", "coffee maker", "pair of headphones", "bicycle",
    "suitcase", "office chair", "tent", "keyboard", "watch", "water bottle", "rain jacket",
    "camera", "pair of shoes", "phone case",
)  # fmt: skip
_FEATURES = (
    "waterproof", "light", "with many pockets", "with a long warranty", "very quiet",
    "made of leather", "foldable", "with a padded strap", "small", "easy to clean",
    "made of recycled material", "with a fast charger",
)  # fmt: skip


def _word(rng: random.Random) -> str:
    """A word that no language has, of one to three syllables."""
    syllables = rng.choice((1, 2, 2, 2, 3))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    )


def _name(rng: random.Random) -> str:
    return " ".join(_word(rng).capitalize() for _ in range(rng.choice((1, 1, 2))))


def _code(rng: random.Random) -> str:
    alphabet = string.ascii_uppercase + string.digits
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 7)))


def _clock(rng: random.Random) -> str:
    hour, minute = (
        rng.randint(1, 12),
        rng.choice(("", ":15", ":30", ":45", f":{rng.randint(1, 59):02}")),
    )
    return f"{hour}{minute} {rng.choice(('am', 'pm'))}"


def _value(field: str, rng: random.Random) -> str | int:
    if field in _WHOLE:
        return rng.choice((rng.randint(1, 9), rng.randint(10, 99), rng.randint(100, 9999)))
    if field == "code":
        return _code(rng)
    if field in ("date", "day"):
        return rng.choice((rng.choice(_DAYS), f"2{rng.randint(0, 9):03}-{rng.randint(1, 12):02}-"
                           f"{rng.randint(1, 28):02}"))  # fmt: skip
    if field == "time":
        return _clock(rng)
    return rng.choice((_name, _word))(rng) if rng.random() < 0.9 else _code(rng)


def _function_name(rng: random.Random) -> str:
    verb, noun = rng.choice(_VERBS), rng.choice(_NOUNS)
    if rng.random() < 0.3:
        noun = _word(rng)
    style = rng.randrange(4)
    if style == 0:
        return f"{verb}_{noun}"
    if style == 1:
        return verb + noun.capitalize()
    if style == 2:
        return verb.capitalize() + noun.capitalize()
    return f"{noun}_{verb}" if rng.random() < 0.5 else f"{verb}_{noun}s"


def _tool(rng: random.Random) -> Record:
    fields = rng.sample(_FIELDS, rng.randint(1, 4))
    if rng.random() < 0.2:
        fields[0] = _word(rng)
    types = {f: {"type": "integer" if f in _WHOLE else "string"} for f in fields}
    name = _function_name(rng)
    plain = "".join(" " + c.lower() if c.isupper() else c for c in name).replace("_", " ").strip()
    return {
        "name": name,
        "description": rng.choice((f"{plain.capitalize()}", f"Use this to {plain}", plain)),
        "parameters": {
            "type": "object",
            "properties": types,
            "required": fields[: rng.randint(1, len(fields))],
        },
    }


def _wish(tool: Record, arguments: Record, rng: random.Random) -> str:
    """What a person types who wants this call; all values stand in it."""
    what = tool["description"].removeprefix("Use this to ")
    what = what[0].lower() + what[1:]
    link = rng.choice((" {f} {v}", " {f}: {v}", " with {f} {v}", " the {f} is {v}", " {v} as {f}"))
    parts = [link.format(f=field, v=value) for field, value in arguments.items()]
    rng.shuffle(parts)
    opening = rng.choice(("Please {}", "Can you {}", "I want to {}", "{}", "Could you {} for me"))
    joined = rng.choice((",", " and", ";")).join(parts)
    ending = rng.choice((".", "?", "", "!"))
    sentence = opening.format(what) + "," * (rng.random() < 0.3) + joined + ending
    return sentence[0].upper() + sentence[1:]


def _arguments(tool: Record, rng: random.Random) -> Record:
    schema = tool["parameters"]
    chosen = [
        field for field in schema["properties"] if field in schema["required"] or rng.random() < 0.5
    ]
    return {field: _value(field, rng) for field in chosen}


def _call_turns(tool: Record, rng: random.Random) -> list[Record]:
    """Question, call, result, answer; now and then a required value must be asked for first."""
    arguments = _arguments(tool, rng)
    required = tool["parameters"]["required"]
    turns: list[Record] = []
    if len(required) > 1 and rng.random() < 0.2:
        missing = required[-1]
        told = {field: value for field, value in arguments.items() if field != missing}
        answer = rng.choice(("{}", "It is {}.", "{}, please.", "The " + missing + " is {}."))
        turns += [
            {"role": "user", "content": _wish(tool, told, rng)},
            {"role": "assistant", "content": f"What is the {missing}?"},
            {"role": "user", "content": answer.format(arguments[missing])},
        ]
    else:
        turns.append({"role": "user", "content": _wish(tool, arguments, rng)})
    field = rng.choice(("id", "code", "status", "result", "reference", "total"))
    value = _code(rng) if field in ("id", "code", "reference") else rng.choice((
        _word(rng), rng.randint(1, 9999)))  # fmt: skip
    reply = rng.choice((f"Done. The {field} is {value}.", f"All set, {field}: {value}.",
                        f"The {field} is {value}."))  # fmt: skip
    turns += [
        {"role": "assistant", "content": "",
         "tool_calls": [{"name": tool["name"], "arguments": arguments}]},
        {"role": "tool", "name": tool["name"], "content": json.dumps({field: value})},
        {"role": "assistant", "content": reply},
    ]  # fmt: skip
    return turns


def _calls(rng: random.Random) -> Record:
    tools = [_tool(rng) for _ in range(rng.randint(2, 5))]
    turns: list[Record] = [{"role": "system", "content": rng.choice(_SYSTEMS)}]
    for _ in range(rng.randint(1, 4)):
        turns += _call_turns(rng.choice(tools), rng)
    return {"messages": turns, "tools": tools}


def _shown(value: float) -> str:
    return str(int(value)) if value == int(value) else str(round(value, 2))


def _sums(rng: random.Random) -> Record:
    name, field = rng.choice((("calculator", "expression"), ("calculate", "expression"),
                              ("evaluate_math", "expr")))  # fmt: skip
    about = ("Evaluate an arithmetic expression", "Compute a mathematical expression", "Do a sum")
    tool = {
        "name": name,
        "description": rng.choice(about),
        "parameters": {"type": "object", "properties": {field: {"type": "string"}},
                       "required": [field]},
    }  # fmt: skip
    tools = [tool, *(_tool(rng) for _ in range(rng.choice((0, 0, 1))))]
    rng.shuffle(tools)
    turns: list[Record] = []
    if rng.random() < 0.7:
        turns.append({"role": "system", "content": rng.choice(_SYSTEMS)})
    for _ in range(rng.randint(1, 4)):
        question, expression, form, value = make_sum(rng)
        number: float = int(value) if value == int(value) else round(value, 2)
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "",
             "tool_calls": [{"name": name, "arguments": {field: expression}}]},
            {"role": "tool", "name": name, "content": json.dumps({"result": number})},
            {"role": "assistant", "content": form.format(_shown(number))},
        ]  # fmt: skip
    return {"messages": turns, "tools": tools}


def _recall(rng: random.Random) -> Record:
    """A person tells something and asks for it later."""
    what = rng.choice(
        ("name", "cat", "dog", "favourite colour", "password", "city", "train", "street")
    )
    value = _code(rng) if what in ("password", "train") else _name(rng)
    told = rng.choice(("My {w} is {v}.", "Remember: my {w} is {v}.", "Hi! My {w} is {v}."))
    turns: list[Record] = [
        {"role": "user", "content": told.format(w=what, v=value)},
        {"role": "assistant", "content": f"Nice to meet you, {value}!" if what == "name"
         else f"I will remember that your {what} is {value}."},
    ]  # fmt: skip
    if rng.random() < 0.5:
        word = _word(rng)
        turns += [
            {"role": "user", "content": f"Say {word}."},
            {"role": "assistant", "content": f"{word.capitalize()}!"},
        ]
    asked = rng.choice(("What is my {}?", "Do you remember my {}?", "Tell me my {}."))
    turns += [
        {"role": "user", "content": asked.format(what)},
        {"role": "assistant", "content": f"Your {what} is {value}."},
    ]
    return {"messages": turns}


def _choice(rng: random.Random) -> Record:
    """A person lists goods and wants one of them: the cheapest, the best, or within a budget."""
    good = rng.choice(_GOODS)
    count = rng.randint(2, 4)
    names = [_name(rng) for _ in range(count)]
    prices = rng.sample(range(9, 400), count)
    ratings = rng.sample(range(30, 50), count)
    features = rng.sample(_FEATURES, count)
    layout = rng.choice(("{i}. {n}, ${p}, rated {r}, {f}", "- {n} (${p}, {r} stars, {f})",
                         "{n}: ${p}, rating {r}, {f}"))  # fmt: skip
    lines = [
        layout.format(i=i + 1, n=names[i], p=prices[i], r=ratings[i] / 10, f=features[i])
        for i in range(count)
    ]
    wish = rng.randrange(3)
    if wish == 0:
        question, best = f"Which {good} is the cheapest?", min(range(count), key=prices.__getitem__)
        why = f"it is the cheapest at ${prices[best]}"
    elif wish == 1:
        question, best = f"Recommend a {good}.", max(range(count), key=ratings.__getitem__)
        why = f"it has the best rating, {ratings[best] / 10}"
    else:
        budget = rng.choice(sorted(prices)) + rng.randint(0, 5)
        within = [i for i in range(count) if prices[i] <= budget]
        question = f"Recommend a {good} for at most ${budget}."
        best = max(within, key=ratings.__getitem__)
        why = f"it costs ${prices[best]} and is rated {ratings[best] / 10}"
    listing = "\n".join(lines)
    text = rng.choice((f"{question}\n{listing}", f"{listing}\n{question}",
                       f"{question} Here is the list:\n{listing}"))  # fmt: skip
    answer = f"I recommend the {names[best]}: {why}, and it is {features[best]}."
    answer = answer.replace("it is with", "it comes with")
    return {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    }


def _repeat(rng: random.Random) -> Record:
    """Words that nobody has heard, to be said again."""
    makers = rng.choices((_word, _name, _code), k=rng.randint(6, 30))
    words = " ".join(maker(rng) for maker in makers)
    asked = rng.choice(("Repeat: {}", "Say this again: {}", "{}\nRepeat that.", "Copy this:\n{}"))
    turns = [
        {"role": "user", "content": asked.format(words)},
        {"role": "assistant", "content": words},
    ]
    return {"messages": turns}


def _forms(rng: random.Random) -> Record:
    """A form filled in by a person; some of its fields are wanted as JSON, in another order."""
    fields = rng.sample(_FIELDS, rng.randint(3, 10))
    values = {field: _value(field, rng) for field in fields}
    link, end = rng.choice((": ", " is ", " = ", " - ")), rng.choice(("\n", ", ", "; ", ". "))
    told = end.join(f"{field}{link}{value}" for field, value in values.items())
    turns: list[Record] = []
    for number in range(rng.choice((1, 2, 2))):
        wanted = rng.sample(fields, rng.randint(1, len(fields)))
        asked = rng.choice(("Give me {} as JSON.", "JSON with {}, please.", "Write {} as JSON."))
        question = asked.format(", ".join(wanted))
        if number == 0:
            question = f"{told}\n{question}"
        answer = json.dumps({field: values[field] for field in wanted})
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


_MAKERS: dict[str, tuple[Callable[[random.Random], Record], int]] = {
    "made_calls": (_calls, 20_000),
    "made_sums": (_sums, 6_000),
    "made_recall": (_recall, 5_000),
    "made_choice": (_choice, 5_000),
    "made_repeat": (_repeat, 10_000),
    "made_forms": (_forms, 10_000),
}
MADE_SOURCES = frozenset(_MAKERS)
"""The sources that this module makes."""


def make_records(split: str, seed: int, sources: frozenset[str] = MADE_SOURCES) -> Iterator[Record]:
    """Yields the made records of a split.

    Args:
        split: `train`, or `heldout`, which has a hundredth and is drawn from other random numbers.
        seed: of the random numbers.
        sources: which to make; others are passed over.
    """
    for source in sorted(MADE_SOURCES & sources):
        maker, count = _MAKERS[source]
        rng = random.Random(f"{seed} {split} {source}")
        for _ in range(count if split == "train" else count // 100):
            yield {**maker(rng), "source": source}
