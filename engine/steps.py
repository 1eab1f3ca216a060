"""What passes between scheduler and runner: requests in flight, the plan of a step, its outcome."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection
from enum import Enum
from math import inf, isnan
from typing import NamedTuple

from engine.blocks import InvariantError
from engine.cache import Holding
from engine.errors import PromptTooLong, RequestError
from engine.fairness import Account, Order
from engine.types import Delta, FinishReason, Request, TokenLogprobs, Usage

__all__ = ["Phase", "Plan", "RequestState", "Row", "StepOutput", "check_request"]


class Phase(Enum):
    """Where a request is in its life inside the scheduler."""

    WAITING = "waiting"
    """Holds no blocks: new, or preempted."""
    RUNNING = "running"
    """Holds blocks for at least all its tokens but the newest."""
    FINISHED = "finished"
    """Its last delta is out, it holds nothing, and no row of it counts any more."""


_NEXT_PHASES = {
    Phase.WAITING: (Phase.RUNNING, Phase.FINISHED),
    Phase.RUNNING: (Phase.WAITING, Phase.FINISHED),
    Phase.FINISHED: (),
}


class RequestState:
    """A request in flight. The scheduler writes it; the runner reads it between plan and commit.

    Attributes:
        order: (priority, due, arrival): the lesser goes first among requests of one tenant.
        account: its tenant's account in its priority; set by the scheduler when it is taken.
        token_ids: prompt and generated tokens; ``token_ids[num_computed:]`` wait to be computed.
        num_prompt: tokens of the prompt.
        num_computed: leading tokens whose state is in the blocks.
        num_cached: prompt tokens whose state first came from the prefix cache.
        max_len: tokens at which it ends, by its own limit or the model's.
        stop_ids: tokens that end it, the end-of-sequence tokens included unless it ignores them.
        output_counts: how often each token was generated.
        prompt_logprobs: entries so far, one for each prompt token from the second on; None when
            not asked for or already delivered.
        prompt_seen: leading prompt tokens that were counted as computed or cached.
        num_pending: tokens after ``num_computed`` that a step computes while the next is planned.
        num_unknown: tokens after ``token_ids`` that this step draws: 0 or 1.
        draws_blindly: a token can be drawn before those who plan know the one before it.
        is_plain: its draws need nothing but temperature, truncation and a seed.
    """

    __slots__ = (
        "account",
        "draws_blindly",
        "holding",
        "is_plain",
        "max_len",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "num_unknown",
        "order",
        "output_counts",
        "phase",
        "prompt_logprobs",
        "prompt_seen",
        "request",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        arrival: int,
        holding: Holding,
        max_model_len: int,
        eos_token_ids: Collection[int],
    ) -> None:
        sampling = request.sampling
        self.account: Account
        self.request = request
        self.order: Order = (request.priority, request.due_s, arrival)
        self.token_ids = request.prompt_ids + request.output_ids
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = 0
        self.num_cached = 0
        self.holding = holding
        self.phase = Phase.WAITING
        self.max_len = min(self.num_prompt + sampling.max_tokens, max_model_len)
        self.stop_ids = frozenset(sampling.stop_token_ids).union(
            () if sampling.ignore_eos else eos_token_ids
        )
        self.output_counts: dict[int, int] = dict(Counter(request.output_ids))
        self.num_preemptions = 0
        self.prompt_seen = 0
        self.num_pending = 0
        self.num_unknown = 0
        # Penalties count the tokens of the answer, which is done where they are known.
        self.draws_blindly = not sampling.penalises
        self.is_plain = not sampling.modifies_logits and sampling.logprobs is None
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None if sampling.prompt_logprobs is None or request.output_ids else []
        )

    @property
    def block_ids(self) -> list[list[int]]:
        """The blocks that hold its state, one list for each cache group, in order of position."""
        return self.holding.block_ids

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether entries of its prompt are still missing."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why its newest token ends it; None: it does not.

        End and stop tokens do so only once ``min_tokens`` were generated before them.
        """
        token_ids = self.token_ids
        if token_ids[-1] in self.stop_ids and self.num_output > self.request.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(token_ids) >= self.max_len else None

    @property
    def num_left(self) -> int:
        """Tokens that no step computes or has computed yet."""
        known = len(self.token_ids) + self.num_unknown
        return known - self.num_computed - self.num_pending

    @property
    def is_ending(self) -> bool:
        """Whether the token that is being drawn will be its last, whichever it is."""
        return len(self.token_ids) + self.num_unknown >= self.max_len

    @property
    def usage(self) -> Usage:
        """What it cost so far."""
        return Usage(self.num_prompt, self.num_cached, self.num_output, self.num_preemptions)

    def last_delta(self, reason: FinishReason, error: str | None = None) -> Delta:
        """What ends it when no token does."""
        return Delta(
            request_id=self.request.request_id,
            token_ids=[],
            finish_reason=reason,
            usage=self.usage,
            error=error,
        )

    def move(self, phase: Phase) -> None:
        """Enter another phase. Raises InvariantError if there is no way from here to there."""
        if phase not in _NEXT_PHASES[self.phase]:
            raise InvariantError(
                f"request {self.request.request_id} is {self.phase.value}, "
                f"from where it cannot become {phase.value}"
            )
        self.phase = phase

    def check_integrity(self) -> None:
        """Compare its figures. Raises InvariantError that names a contradiction."""
        held = self.holding.capacity
        if not 0 <= self.num_computed < len(self.token_ids) < self.max_len:
            raise InvariantError(f"{self} should be finished, or is ahead of its tokens")
        if (self.phase is Phase.RUNNING) != (
            held > 0
        ) or held < self.num_computed + self.num_pending:
            raise InvariantError(f"{self} holds blocks for {held} tokens")
        if self.holding.publish_at <= self.num_computed:
            raise InvariantError(f"{self} has full blocks that were not published")

    def __repr__(self) -> str:
        return (
            f"<RequestState {self.request.request_id} {self.phase.value} order={self.order} "
            f"computed {self.num_computed} of {len(self.token_ids)} tokens>"
        )


def check_request(request: Request, max_model_len: int) -> None:
    """Raise PromptTooLong or RequestError for one that no engine of this length could take."""
    if not request.prompt_ids:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
    if len(request.prompt_ids) >= max_model_len:
        raise PromptTooLong(
            f"the prompt has {len(request.prompt_ids)} tokens; with a context of "
            f"{max_model_len} it may have at most {max_model_len - 1}",
            param="prompt",
        )
    if not 0 < request.weight < inf:
        raise RequestError(f"weight is {request.weight}; it must be > 0", param="weight")
    if isnan(request.due_s):
        raise RequestError("due_s is not a number", param="due_s")
    try:
        array("I", request.prompt_ids + request.output_ids)
    except (OverflowError, TypeError) as error:
        message = f"the prompt is not made of token ids: {error}"
        raise RequestError(message, param="prompt") from None


class Row(NamedTuple):
    """One request's part of a step: computes ``state.token_ids[start : start + num_new]``."""

    state: RequestState
    start: int
    num_new: int
    samples: bool
    """The request has caught up with its tokens, so the next one is drawn."""
    prompt_logprobs: bool
    """Log-probabilities of the prompt tokens that these positions predict are wanted."""

    @property
    def num_prompt_logprobs(self) -> int:
        """Entries wanted: for prompt tokens ``start + 1`` up to ``start + num_new``."""
        if not self.prompt_logprobs:
            return 0
        return min(self.start + self.num_new, self.state.num_prompt - 1) - self.start


class Plan(NamedTuple):
    """What to compute in one step; no rows: nothing to do. No request has two rows."""

    rows: list[Row]
    num_tokens: int
    """New tokens over all rows."""
    alone: bool = False
    """It is a newcomer's, who has the step to itself."""

    def check(self, output: StepOutput) -> None:
        """Raise InvariantError unless ``output`` has what each row that samples brings."""
        drawn = sum([row.samples for row in self.rows])
        if len(output.token_ids) != drawn or len(output.logprobs) != drawn:
            raise InvariantError(
                f"{drawn} rows sample, but the step brought {len(output.token_ids)} tokens "
                f"and {len(output.logprobs)} logprobs"
            )

    @property
    def only_decodes(self) -> bool:
        """Whether every row computes one token and plainly draws the next."""
        return self.num_tokens == len(self.rows) and all(
            row.samples and row.state.is_plain and not row.prompt_logprobs for row in self.rows
        )

    @property
    def can_be_followed(self) -> bool:
        """Whether the next step can be launched before this one's tokens are known."""
        return all(row.state.draws_blindly for row in self.rows if row.samples)

    def assume(self) -> None:
        """Let its requests count as having gone on, until ``settle``."""
        for state, _, num_new, samples, _ in self.rows:
            state.num_pending = num_new
            state.num_unknown = int(samples)

    def settle(self) -> None:
        """Take ``assume`` back: what it brought is known, or will never be."""
        for row in self.rows:
            row.state.num_pending = row.state.num_unknown = 0


class StepOutput(NamedTuple):
    """What a step brought, in the order of the plan's rows."""

    token_ids: list[int]
    """The drawn token of each row that samples."""
    logprobs: list[TokenLogprobs | None]
    """Parallel to ``token_ids``; None for requests that did not ask."""
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    """Row index to ``Row.num_prompt_logprobs`` entries."""
