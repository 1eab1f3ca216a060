"""The engine process: ``python -m engine FD``, started by ``EngineClient`` and by nobody else.

FD is this process's end of a socket pair. The process ends when the other end is closed.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.link import Configure, Failed, Link, LinkClosed, Loading, Ready
from engine.types import ModelInfo

if TYPE_CHECKING:
    from engine.core import Core

log = logging.getLogger("millrace.engine")


def main() -> int:
    """Load the model the first message names and serve until the server is gone."""
    # A Ctrl-C in the terminal reaches the whole process group; the server decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    try:
        return _serve(link)
    except LinkClosed:
        return 0


def _serve(link: Link) -> int:
    while not (messages := link.receive(60.0)):
        continue
    (first,) = messages
    assert isinstance(first, Configure)
    try:
        core, info = _load(link, first)
    except EngineError as error:
        link.send(Failed(type(error).__name__, str(error)))
        link.drain(5.0)
        return 1
    # Everything loaded so far lives as long as the process: keep it out of every later collection.
    gc.collect()
    gc.freeze()
    link.send(Ready(info))
    core.run()
    return 0


def _load(link: Link, configure: Configure) -> tuple[Core, ModelInfo]:
    # Imported here so that the first progress message does not wait for torch.
    link.send(Loading("importing torch", 0.0))
    from engine.cache import CacheManager, FullAttentionGroup
    from engine.core import Core
    from engine.fairness import TokenCosts
    from engine.runner import Runner
    from engine.scheduler import Scheduler

    config = configure.config
    runner = Runner(config, lambda stage, fraction: link.send(Loading(stage, fraction)))
    info = runner.info
    cache = CacheManager(
        [FullAttentionGroup()],
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        enable_prefix_cache=config.prefix_cache,
    )
    scheduler = Scheduler(
        cache,
        max_num_tokens=config.max_num_tokens,
        max_num_seqs=config.max_num_seqs,
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
        check_integrity=config.check_integrity,
    )
    return core, info


if __name__ == "__main__":
    sys.exit(main())
