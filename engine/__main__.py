"""The engine's processes: ``python -m engine FD``, started by ``EngineClient`` and by nobody else.

FD is this process's end of a socket pair. The process imports what an engine needs and forks one
whenever it is asked to (``engine.zygote``). Each of them ends when the other end of its own socket
is closed.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.link import Configure, Failed, Link, LinkClosed, Loading, Ready, Working
from engine.pulse import Pulse
from engine.types import ModelInfo
from engine.zygote import NAME, Zygote, tell_system

if TYPE_CHECKING:
    from engine.core import Core

log = logging.getLogger("millrace.engine")

_COLLECTED_AFTER = 20_000
"""New objects after which the garbage collector looks at them; they are seldom part of a cycle."""
_STEP_FAILED = 70
"""Exit code: a step could not be computed (EX_SOFTWARE of sysexits.h)."""
_FIRST_TO_GO, _SECOND_TO_GO = "500", "250"
"""Added to an engine's and a zygote's badness when the system runs out of memory (proc(5),
oom_score_adj): an engine can be replaced without losing anything, the server cannot. Ending the
zygote would free little, for its memory is the engine's, too, and the next engine came late."""


def main() -> int:
    """Fork engines until the server is gone; in an engine, serve until it is."""
    # A Ctrl-C in the terminal reaches the whole process group; the server decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    tell_system("oom_score_adj", _SECOND_TO_GO)
    tell_system("comm", NAME)
    zygote = Zygote(socket.socket(fileno=int(sys.argv[1])))
    zygote.say(Loading("importing torch", 0.0))
    sock = zygote.serve(_import)
    if sock is None:
        return 0
    tell_system("oom_score_adj", _FIRST_TO_GO)
    tell_system("comm", "millrace-engine")
    try:
        return _serve(Link(sock))
    except LinkClosed:
        return 0


def _import() -> None:
    from engine import cache, core, runner, scheduler  # noqa: F401 - for those that are forked


def _serve(link: Link) -> int:
    """Load the model the first message names and serve. Raises LinkClosed."""
    from engine import core

    while not (messages := link.receive(60.0)):
        continue
    (first,) = messages
    assert isinstance(first, Configure)
    link.send(Working(0.0))
    try:
        loop, info = _load(link, first)
    except EngineError as error:
        link.send(Failed(type(error).__name__, str(error)))
        link.drain(5.0)
        return 1
    # Everything loaded so far lives as long as the process: keep it out of every later collection.
    # What comes later is mostly freed by its counts; a collection in every few steps finds nothing.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_AFTER, 20, 50)
    link.send(Ready(info))
    try:
        loop.run()
    except core.StepFailed as error:
        cause = error.__cause__
        if core.is_lack_of_memory(cause):
            log.critical("%s: out of memory; ending, for another to go on", error)
        else:
            log.critical("%s; ending, for another to go on", error, exc_info=cause)
        link.drain(1.0)
        return _STEP_FAILED
    return 0


def _load(link: Link, configure: Configure) -> tuple[Core, ModelInfo]:
    # Imported here so that the zygote's first message does not wait for torch.
    from engine.cache import CacheManager, FullAttentionGroup
    from engine.core import Core
    from engine.fairness import TokenCosts
    from engine.runner import Runner
    from engine.scheduler import Scheduler

    config = configure.config
    runner = Runner(
        config,
        lambda stage, fraction: link.send(Loading(stage, fraction)),
        Pulse(lambda silence_s: link.send(Working(silence_s))),
    )
    info = runner.info
    cache = CacheManager(
        [FullAttentionGroup()],
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        enable_prefix_cache=config.prefix_cache,
    )
    scheduler = Scheduler(
        cache,
        max_num_tokens=runner.limits.max_num_tokens,
        max_num_seqs=runner.limits.max_num_seqs,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        chunk_tokens=config.chunk_tokens,
        costs=TokenCosts(config.prompt_cost, config.cached_cost, config.decode_cost),
        shared_prompt_tokens=config.shared_prompt_tokens,
    )
    core = Core(
        link,
        scheduler,
        runner,
        vocab_size=info.vocab_size,
        steps_ahead=runner.steps_ahead,
        check_integrity=config.check_integrity,
    )
    return core, info


if __name__ == "__main__":
    sys.exit(main())
