"""Seeded requests whose answers are known from a run that nobody disturbed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import aiohttp

__all__ = ["Answer", "Question", "answers_of", "make_questions"]

WORDS = (
    "river stone light winter bread horse letter garden music island paper morning".split()  # noqa: SIM905
)


class Question(NamedTuple):
    """One request; the same question always has the same answer."""

    prompt: str
    num_tokens: int
    seed: int | None
    """None: greedy."""

    def body(self, **more: Any) -> dict[str, Any]:
        """The request of the Responses API."""
        sampling = {"temperature": 0} if self.seed is None else {"temperature": 1}
        if self.seed is not None:
            sampling["seed"] = self.seed
        return {
            "model": "pebble",
            "input": self.prompt,
            "max_output_tokens": self.num_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "store": True,
            **sampling,
            **more,
        }


class Answer(NamedTuple):
    """What a question brings when nothing goes wrong."""

    text: str
    token_ids: tuple[int, ...]


def make_questions(
    rng: random.Random, count: int, *, least: int = 40, most: int = 160
) -> list[Question]:
    """Draw ``count`` questions, every other one greedy, of ``least`` to ``most`` tokens."""
    questions = []
    for number in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(2, 30)))
        seed = None if number % 2 else rng.randrange(2**31)
        questions.append(Question(f"Tell me of {words}.", rng.randint(least, most), seed))
    return questions


async def answers_of(
    session: aiohttp.ClientSession, url: str, questions: Iterable[Question]
) -> dict[Question, Answer]:
    """Ask each question once, alone and without a stream, and return the answers."""
    answers = {}
    for question in questions:
        # The Responses object has no token ids, so Chat Completions would not do either: the
        # stream is read, from a server that nobody disturbs.
        body = question.body(stream=True)
        text, token_ids = "", []
        async with session.post(f"{url}/v1/responses", json=body) as response:
            assert response.status == 200, await response.text()
            frames = (await response.read()).split(b"\n\n")
        for event in _events(frames):
            if event["type"] == "response.output_text.delta":
                text += event["delta"]
                token_ids += event["token_ids"]
        assert len(token_ids) == question.num_tokens, (question, len(token_ids))
        answers[question] = Answer(text, tuple(token_ids))
    return answers


def _events(frames: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    import orjson

    for frame in frames:
        for line in frame.split(b"\n"):
            if line.startswith(b"data: "):
                yield orjson.loads(line[6:])
