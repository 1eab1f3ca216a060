"""Greedy answers from the engine itself, in this process: what is measured is what is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.cache import CacheManager, FullAttentionGroup
from engine.config import Device, EngineConfig
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.train.dialogue import Record
from engine.train.evaluation.replies import Reply, parse_reply
from engine.types import FinishReason, Request, SamplingParams

__all__ = ["Generator"]

_MAX_NUM_SEQS = 64


@dataclass(slots=True)
class _Answer:
    token_ids: list[int]
    complete: bool = False


class Generator:
    """One model with its tokenizer, answering many prompts at once.

    Args:
        model: checkpoint directory.
        max_tokens: most tokens of an answer; one that reaches it is cut off.
        num_threads: compute threads on a CPU; None: all cores this process may use.
        device: where the model runs.

    Raises:
        CheckpointError, TokenizerError: the checkpoint is missing, damaged or not supported.
    """

    def __init__(
        self,
        model: Path,
        *,
        max_tokens: int = 256,
        num_threads: int | None = None,
        device: Device = Device.AUTO,
    ) -> None:
        config = EngineConfig(
            model=str(model), device=device, num_threads=num_threads, max_num_seqs=_MAX_NUM_SEQS
        )
        self._runner = Runner(config)
        info = self._runner.info
        cache = CacheManager(
            [FullAttentionGroup()],
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            enable_prefix_cache=True,
        )
        self._scheduler = Scheduler(
            cache,
            max_num_tokens=self._runner.limits.max_num_tokens,
            max_num_seqs=self._runner.limits.max_num_seqs,
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            chunk_tokens=config.chunk_tokens,
        )
        self._max_tokens = max_tokens
        self._context = info.max_model_len
        self._num_parameters = info.num_parameters
        self._tokenizer = Tokenizer.load(model)

    @property
    def num_parameters(self) -> int:
        """Of the model, tied ones once."""
        return self._num_parameters

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._context

    def close(self) -> None:
        """End the process that renders chat templates."""
        self._tokenizer.close()

    def reply_all(
        self,
        dialogues: Iterable[tuple[Sequence[Record], Sequence[Record]]],
        *,
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Reply | None]:
        """The next assistant turn of each dialogue, drawn greedily.

        Args:
            dialogues: messages so far and tools, as training records have them.
            on_done: called once for each dialogue when its turn is there.

        Returns:
            One reply for each dialogue; None where the context has no room for its prompt and an
            answer.
        """
        answers: list[_Answer | None] = []
        for messages, tools in dialogues:
            prompt = self._prompt(messages, tools)
            if len(prompt) + self._max_tokens > self._context:
                answers.append(None)
                on_done()
                continue
            sampling = SamplingParams(max_tokens=self._max_tokens, temperature=0.0)
            self._scheduler.add(
                Request(request_id=str(len(answers)), prompt_ids=prompt, sampling=sampling)
            )
            answers.append(_Answer([]))
        self._run(answers, on_done)
        return [None if answer is None else self._reply(answer) for answer in answers]

    def _prompt(self, messages: Sequence[Record], tools: Sequence[Record]) -> list[int]:
        wrapped = [{"type": "function", "function": tool} for tool in tools]
        return self._tokenizer.render_chat(messages, tools=wrapped or None)

    def _run(self, answers: list[_Answer | None], on_done: Callable[[], None]) -> None:
        while self._scheduler.has_work:
            plan = self._scheduler.plan()
            for delta in self._scheduler.commit(plan, self._runner.step(plan)):
                answer = answers[int(delta.request_id)]
                assert answer is not None
                answer.token_ids += delta.token_ids
                if delta.finish_reason is not None:
                    answer.complete = delta.finish_reason is FinishReason.STOP
                    on_done()

    def _reply(self, answer: _Answer) -> Reply:
        return parse_reply(self._tokenizer.decode(answer.token_ids), complete=answer.complete)
