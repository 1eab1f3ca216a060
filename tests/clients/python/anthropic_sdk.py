"""The official ``anthropic`` package: whether there is an endpoint for it."""

from __future__ import annotations

import anthropic

from tests.clients.python.worker import HELLO, Absent, Target, serve


class Messages:
    def __init__(self, target: Target) -> None:
        self.target = target

    def chat(self) -> None:
        client = anthropic.Anthropic(
            base_url=self.target.url.removesuffix("/v1"), api_key=self.target.key, max_retries=0
        )
        try:
            answer = client.messages.create(
                model=self.target.model,
                max_tokens=16,
                messages=[{"role": "user", "content": HELLO}],
            )
        except anthropic.NotFoundError as error:
            raise Absent(f"NotFoundError {error.status_code}") from error
        assert answer.content


if __name__ == "__main__":
    serve("anthropic", lambda target: {"messages": Messages(target)})
