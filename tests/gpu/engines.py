"""Our engine under measurement, and transformers' two fast ways to generate, on the same sizes."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.config import Device, KvCacheDtype, Quantization
from engine.graphs import Repeater
from engine.steps import StepOutput
from tests.bench.checkpoints import Shape, make_hollow
from tests.bench.engine import gaps
from tests.engine.harness import Engine
from tests.gpu.journal import Figures
from tests.gpu.parts import Absent
from tests.gpu.setting import Setting, scratch_folder
from tests.gpu.shapes import shape_of
from tests.gpu.weights import bytes_of, made_up_weights

__all__ = ["MODES", "Ours", "Peer", "new_engine", "open_ours", "open_peer", "random_prompts"]

MODES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": Quantization.FP8},
    "fp8-kv8": {"quantization": Quantization.FP8, "kv_cache_dtype": KvCacheDtype.FP8},
    "bf16-invariant": {"batch_invariant": True},
    "bf16-eager": {"cuda_graphs": False, "steps_ahead": 0},
}
"""Name -> settings of the engine."""
BLOCK = 16
WARM_UP_STEPS = 4
MEASURED_S = 1.5
MEASURED_STEPS = 64
PEER_TOKENS = 24
LONGEST = 102_400 + 256
"""Tokens of the longest request."""


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Random prompts, other ones at each call."""
    return [[random.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def new_engine(setting: Setting, folder: Path | str, **settings: Any) -> Engine:
    """An engine on the device of the run; in a dry one with what stands in for CUDA graphs."""
    if not setting.dry:
        return Engine(folder, device=Device.CUDA, **settings)
    if settings.get("cuda_graphs", True):
        settings = {"recorder": Repeater(), "steps_ahead": 1, **settings}
    with setting.ops_for(settings):
        return Engine(folder, device=Device.CPU, **settings)


class Ours:
    """Our engine, in this process and without the link, its weights and its cache random."""

    def __init__(self, setting: Setting, folder: Path, settings: dict[str, Any]) -> None:
        self.setting = setting
        longest = setting.size(LONGEST, 320)
        self.engine = new_engine(
            setting,
            folder,
            max_model_len=longest,
            max_num_seqs=setting.size(256, 4),
            max_num_tokens=setting.size(8192, 64),
            kv_memory_bytes=1 << 22 if setting.dry else None,
            block_size=BLOCK,
            **settings,
        )
        self.vocab_size = self.engine.runner.info.vocab_size
        self._fill_cache()

    def decode(self, streams: int, context: int) -> Figures:
        """Answers to ``streams`` prompts that are in the cache but for their ends."""
        streams, context = self.setting.size(streams, 4), self.setting.size(context, 48)
        room = (self.engine.runner.info.num_blocks - 1) * BLOCK
        wanted = streams * (context + MEASURED_STEPS * 4)
        if wanted > room:
            raise Absent(f"{wanted} tokens are more than the cache's {room}")
        engine = self.engine
        engine.reset()
        prompts = random_prompts(self.vocab_size, streams, context)
        self._pretend(prompts)
        for prompt in prompts:
            engine.add(prompt, max_tokens=MEASURED_STEPS * 4, ignore_eos=True)
        answers = list(engine.answers.values())
        while not all(answer.token_ids for answer in answers):
            engine.step()
        for _ in range(WARM_UP_STEPS):
            engine.step()
        first, ends = sum(len(answer.token_ids) for answer in answers), [time.perf_counter()]
        while ends[-1] - ends[0] < MEASURED_S and len(ends) <= MEASURED_STEPS:
            engine.step()
            ends.append(time.perf_counter())
        tokens = sum(len(answer.token_ids) for answer in answers) - first
        took_s = ends[-1] - ends[0]
        self.end_all()
        return {"tokens_per_s": tokens / took_s, "step_ms": took_s / (len(ends) - 1) * 1e3}

    def end_all(self) -> None:
        """End what is under way, and see that the books are right."""
        for name, answer in self.engine.answers.items():
            if answer.finish_reason is None:
                self.engine.abort(name)
        self.engine.run()

    def read(self, length: int) -> Figures:
        """The first token of a new prompt, after a shorter one to warm up."""
        length = self.setting.size(length, 96)
        self.engine.reset()
        for size in (min(length, 2048), length):
            (prompt,) = random_prompts(self.vocab_size, 1, size)
            started = time.perf_counter()
            self.engine.generate(prompt, max_tokens=1)
            took_s = time.perf_counter() - started
        return {"tokens_per_s": length / took_s, "first_ms": took_s * 1e3}

    def memory(self) -> Figures:
        """Bytes of the weights and of a token in the cache."""
        runner: Any = self.engine.runner
        tokens = runner.info.num_blocks * BLOCK
        return {
            "GiB": bytes_of(runner._model) / 2**30,
            "KiB a token": self._cache_bytes() / tokens / 1024,
        }

    def _cache_bytes(self) -> int:
        runner: Any = self.engine.runner
        return sum(part.nbytes for layer in runner._cache.layers for part in layer[:2])

    @torch.inference_mode()
    def _fill_cache(self) -> None:
        """Numbers of a usual size: zeros would be multiplied faster than they ever are."""
        runner: Any = self.engine.runner
        for layer in runner._cache.layers:
            for part in layer[:2]:
                step = max(1, (1 << 24) // part[0].numel())
                for blocks in part.split(step):
                    blocks.copy_(torch.randn(blocks.shape, device=part.device).to(part.dtype))

    def _pretend(self, prompts: list[list[int]]) -> None:
        """Let the prefix cache believe that these were computed, which takes no time at all."""
        scheduler = self.engine.scheduler
        for prompt in prompts:
            self.engine.add(prompt, max_tokens=1, ignore_eos=True)
        while scheduler.has_work:
            plan = scheduler.plan()
            drawn = sum(row.samples for row in plan.rows)
            scheduler.commit(plan, StepOutput([3] * drawn, [None] * drawn, {}))
        self.engine.answers.clear()


@contextlib.contextmanager
def open_ours(setting: Setting, model: str, mode: str) -> Iterator[Ours]:
    """An engine of this model in this mode."""
    random.seed(0)
    shape = shape_of(setting, model)
    with tempfile.TemporaryDirectory(prefix="millrace-gpu-", dir=scratch_folder()) as name:
        folder = make_hollow(shape, Path(name))
        with made_up_weights():
            ours = Ours(setting, folder, MODES[mode])
    yield ours


class Peer:
    """transformers' model of the same sizes, random, made on the device."""

    def __init__(self, setting: Setting, shape: Shape) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from transformers.utils import logging

        quiet: Any = logging
        quiet.set_verbosity_error()
        self.setting, self.vocab_size = setting, shape.vocab_size
        config: Any = Qwen3Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=131_072,
            initializer_range=shape.hidden_size**-0.5,
        )
        family: Any = Qwen3ForCausalLM
        with torch.device(setting.device):
            self.model: Any = family._from_config(config, dtype=setting.act).eval()
        self.model.generation_config.eos_token_id = None

    def batching(self, streams: int, context: int, *, graphs: bool = True) -> Figures:
        """Continuous batching with CUDA graphs, timed by its own clock of each token."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        streams, context = self.setting.size(streams, 4), self.setting.size(context, 48)
        page = 256
        pages = -(-(context + PEER_TOKENS) // page)
        new_generation: Any = GenerationConfig
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=streams * pages + 1,
            max_batch_tokens=min(8192, streams * context),
            max_requests_per_batch=streams,
            max_blocks_per_request=pages + pages % 2,
            allow_block_sharing=False,
            use_cuda_graph=graphs and not self.setting.dry,
        )
        started = time.perf_counter()
        answers = self.model.generate_batch(
            random_prompts(self.vocab_size, streams, context),
            generation_config=new_generation(
                max_new_tokens=PEER_TOKENS, do_sample=False, eos_token_id=-1
            ),
            continuous_batching_config=config,
            record_timestamps=True,
            warmup=not self.setting.dry,
        )
        times: list[list[float]] = [answer.timestamps for answer in answers.values()]
        if len(times) < streams or not all(len(moments) == PEER_TOKENS for moments in times):
            raise Absent("transformers did not answer all requests")
        all_read, first_done = max(t[0] for t in times), min(t[-1] for t in times)
        counted = sum(all_read < moment <= first_done for t in times for moment in t)
        if not counted:
            raise Absent("transformers' answers did not overlap")
        return {
            "tokens_per_s": counted / (first_done - all_read),
            "step_ms": statistics.median(gaps(t[WARM_UP_STEPS:]) for t in times) * 1e3,
            "first_ms": (statistics.median(t[0] for t in times) - started) * 1e3,
        }

    def batching_eager(self, streams: int, context: int) -> Figures:
        """The same without graphs."""
        return self.batching(streams, context, graphs=False)

    def compiled(self, streams: int, context: int) -> Figures:
        """``generate`` with a static cache and a compiled step."""
        from transformers import CompileConfig

        streams, context = self.setting.size(streams, 4), self.setting.size(context, 48)
        options: Any = {}
        if not self.setting.dry:  # where generate would not compile
            new: Any = CompileConfig
            options["compile_config"] = new(fullgraph=False, mode="reduce-overhead")
        ends: list[float] = []

        def note(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            self.setting.sync()
            ends.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        for _ in range(2):  # once to compile
            ends.clear()
            ids = torch.tensor(
                random_prompts(self.vocab_size, streams, context), device=self.setting.device
            )
            started = time.perf_counter()
            with torch.inference_mode():
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=PEER_TOKENS,
                    do_sample=False,
                    cache_implementation="static",
                    stopping_criteria=[note],
                    pad_token_id=0,
                    **options,
                )
        measured = ends[WARM_UP_STEPS:]
        step_s = statistics.median(after - before for before, after in itertools.pairwise(measured))
        return {
            "tokens_per_s": streams / step_s,
            "step_ms": step_s * 1e3,
            "first_ms": (ends[0] - started) * 1e3,
        }


@contextlib.contextmanager
def open_peer(setting: Setting, model: str) -> Iterator[Peer]:
    """transformers' model."""
    random.seed(0)
    yield Peer(setting, shape_of(setting, model))
    torch._dynamo.reset()
