"""Sampling settings of a request body, the same in every dialect that has them.

Names and ranges are OpenAI's where OpenAI has the field; ``deadline_s`` is our own. The others
(``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos``, ``stop_token_ids``,
``prompt_logprobs``, ``include_stop_str_in_output``) keep the names and meanings vLLM gave them.
"""

from __future__ import annotations

from server.dialects.fields import Fields, show
from server.errors import invalid
from server.request import SamplingOptions

__all__ = ["MAX_CHOICES", "MAX_TOP_LOGPROBS", "SAMPLING_FIELDS", "read_n", "read_sampling"]

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_BIASED_TOKENS = 4096

SAMPLING_FIELDS = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "stop",
        "include_stop_str_in_output",
        "stop_token_ids",
        "ignore_eos",
        "min_tokens",
        "prompt_logprobs",
        "deadline_s",
    }
)
"""What read_sampling reads, for Fields.refuse_unknown."""


def read_n(fields: Fields) -> int:
    """Return how many answers each prompt gets."""
    n = fields.integer("n", least=1, most=MAX_CHOICES)
    return 1 if n is None else n


def read_sampling(
    fields: Fields, *, vocab_size: int, max_tokens: int | None, logprobs: int | None
) -> SamplingOptions:
    """Read what all dialects share; ``max_tokens`` and ``logprobs`` are read by the dialect.

    Raises ApiError 400 naming the field at fault.
    """
    min_tokens = fields.integer("min_tokens", least=0) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid(
            f"Invalid value for '{fields.at('min_tokens')}': {min_tokens} is more than the "
            f"{max_tokens} tokens the answer may have.",
            param=fields.at("min_tokens"),
            code="invalid_value",
        )
    seed = fields.integer("seed", least=-(2**63), most=2**63 - 1)
    return SamplingOptions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=fields.number("temperature", least=0, most=2),
        top_k=_top_k(fields),
        top_p=_above_zero(fields, "top_p", 1),
        min_p=fields.number("min_p", least=0, most=1),
        repetition_penalty=_above_zero(fields, "repetition_penalty", 100),
        presence_penalty=fields.number("presence_penalty", least=-2, most=2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", least=-2, most=2) or 0.0,
        logit_bias=_logit_bias(fields, vocab_size),
        # The engine's seeds have 63 bits: both signs fold onto them.
        seed=None if seed is None else seed & (2**63 - 1),
        stop=_stop(fields),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output", False),
        stop_token_ids=tuple(
            fields.token_ids("stop_token_ids", vocab_size=vocab_size, max_len=MAX_STOP_TOKEN_IDS)
            or ()
        ),
        ignore_eos=fields.boolean("ignore_eos", False),
        logprobs=logprobs,
        prompt_logprobs=fields.integer("prompt_logprobs", least=0, most=MAX_TOP_LOGPROBS),
        deadline_s=_above_zero(fields, "deadline_s", 3600),
    )


def _top_k(fields: Fields) -> int | None:
    top_k = fields.integer("top_k", least=-1)
    # Clients of vLLM write -1 for "off"; inside, 0 is.
    return 0 if top_k == -1 else top_k


def _above_zero(fields: Fields, name: str, most: float) -> float | None:
    value = fields.number(name, most=most)
    if value is not None and value <= 0:
        raise invalid(
            f"Invalid value for '{fields.at(name)}': {show(value)}; it must be greater than 0 and "
            f"at most {most}.",
            param=fields.at(name),
            code="invalid_value",
        )
    return value


def _stop(fields: Fields) -> tuple[str, ...]:
    if isinstance(fields.raw("stop"), str):
        stop = [fields.string("stop")]
        paths = [fields.at("stop")]
    else:
        stop = fields.array("stop", max_len=MAX_STOP_STRINGS) or []
        paths = [f"{fields.at('stop')}[{index}]" for index in range(len(stop))]
    words: list[str] = []
    for path, word in zip(paths, stop, strict=True):
        if not isinstance(word, str) or not 0 < len(word) <= MAX_STOP_CHARS:
            raise invalid(
                f"Invalid value for '{path}': {show(word)}; a stop sequence is a string of 1 to "
                f"{MAX_STOP_CHARS} characters.",
                param=path,
                code="invalid_value",
            )
        words.append(word)
    return tuple(words)


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    given = fields.mapping("logit_bias") or {}
    path = fields.at("logit_bias")
    if len(given) > MAX_BIASED_TOKENS:
        raise invalid(
            f"'{path}' has {len(given)} entries; at most {MAX_BIASED_TOKENS} are allowed.",
            param=path,
        )
    inner = Fields(given, path)
    bias: dict[int, float] = {}
    for key in given:
        if not (len(key) < 10 and key.isascii() and key.isdecimal() and int(key) < vocab_size):
            raise invalid(
                f"Invalid key in '{path}': {show(key)} is not a token id of the model "
                f"(0 to {vocab_size - 1}).",
                param=f"{path}.{key}",
                code="invalid_token_id",
            )
        bias[int(key)] = inner.number(key, least=-100, most=100) or 0.0
    return bias
