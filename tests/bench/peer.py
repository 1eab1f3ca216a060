"""transformers behind HTTP, the peer of the HTTP table: Completions over SSE and nothing else.

    python -m tests.bench.peer CHECKPOINT PORT

Its own server, ``transformers serve``, needs packages that Millrace does not; what is underneath is
the same continuous batching, on a GPU with CUDA graphs. One aiohttp process, the model in a thread
of it; each token leaves as one event as soon as it is known. No chat template, no text, no limits,
no storage: less work than a real server has.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import Any

import orjson
import torch
from aiohttp import web

from tests.bench.engine import peer_dtype

__all__ = ["application"]

MANAGER = web.AppKey("manager", object)
PAGE_TOKENS = 256
MAX_STREAMS = 128
MAX_TOKENS = 512


def load(checkpoint: str) -> Any:
    """The manager of continuous batching, started."""
    from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3ForCausalLM

    family: Any = Qwen3ForCausalLM
    gpu = torch.cuda.is_available()
    model = family.from_pretrained(checkpoint, dtype=torch.bfloat16 if gpu else peer_dtype())
    model = model.to("cuda" if gpu else "cpu").eval()
    new_generation: Any = GenerationConfig
    manager = model.init_continuous_batching(
        generation_config=new_generation(
            max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=-1
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            # On a GPU what it has room for.
            num_blocks=None if gpu else MAX_STREAMS * MAX_TOKENS // PAGE_TOKENS + 1,
            use_cuda_graph=gpu,
            max_batch_tokens=2048,
            allow_block_sharing=False,
        ),
    )
    manager.start()
    return manager


def application(checkpoint: str) -> web.Application:
    """``/ready``, ``/v1/models`` and ``/v1/completions``."""
    app = web.Application()
    app[MANAGER] = load(checkpoint)
    numbers = itertools.count()

    async def ready(request: web.Request) -> web.Response:
        return web.Response()

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "transformers"}]})

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        manager: Any = request.app[MANAGER]
        results: asyncio.Queue[Any] = asyncio.Queue()
        name = f"request-{next(numbers)}"
        manager.register_result_handler(name, results.put_nowait)
        manager.add_request(
            body["prompt"],
            request_id=name,
            max_new_tokens=body["max_tokens"],
            streaming=True,
            eos_token_id=-1,
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent, done = 0, False
        while not done:
            result = await results.get()
            done = result.is_finished()
            new = list(result.generated_tokens[sent:])
            sent += len(new)
            event = orjson.dumps({"choices": [{"index": 0, "text": "", "token_ids": new}]})
            await response.write(b"data: " + event + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def stop(app: web.Application) -> None:
        manager: Any = app[MANAGER]
        manager.stop(block=True)

    app.router.add_get("/ready", ready)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    app.on_cleanup.append(stop)
    return app


if __name__ == "__main__":
    web.run_app(application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), print=None)
