"""Plans in, tokens out: the loaded model on its device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec import structs

from engine.adapter import Adapter
from engine.batch import BatchBuilder
from engine.cgroups import cpu_limit
from engine.config import Device, Dtype, EngineConfig, KvCacheDtype, Quantization
from engine.errors import ConfigError
from engine.generation_config import read_sampling_defaults
from engine.graphs import CudaRecorder, Graphs, Recorder, bucket_sizes
from engine.hub import resolve_model
from engine.limits import Limits, choose_num_tokens, first_limits, measure, warm_up
from engine.loader import WeightSource
from engine.memory import available_bytes, num_kv_blocks, zeroed_memory
from engine.model_config import ModelConfig, read_model_config
from engine.models import KVCache, Model, Workspace, family_of, kv_block_bytes
from engine.pulse import Pulse
from engine.quantisation import SCHEMES
from engine.resident import Resident
from engine.sampler import Drawn, Entries, Sampler
from engine.steps import Plan, StepOutput
from engine.transfer import Arrivals
from engine.types import ModelInfo
from kernels import E4M3, BackendUnavailable, Fp8Ops, Ops, select

__all__ = ["LaunchedStep", "Runner"]

log = logging.getLogger("millrace.engine")

_TORCH_DTYPES = {
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.FLOAT32: torch.float32,
}


def _nothing() -> None:
    pass


class LaunchedStep(NamedTuple):
    """A step whose results are on their way."""

    arrivals: Arrivals
    drawn: Drawn | None
    prompts: dict[int, list[Entries]]

    def collect(self) -> StepOutput:
        """Wait until they are there."""
        self.arrivals.wait()
        token_ids, logprobs = self.drawn.read() if self.drawn else ([], [])
        prompts = {
            row: [entry for part in parts for entry in part.read()]
            for row, parts in self.prompts.items()
        }
        return StepOutput(token_ids, logprobs, prompts)


class Runner:
    """Loads a model, sizes its KV cache, and computes steps.

    Args:
        config: what to load and how much memory to use.
        on_progress: called with what is going on and its finished fraction, 0 to 1.
        pulse: told of every piece of a step that is done.
        recorder: what records steps that only decode; None: the device's own, if it has one and
            ``config`` wants it.

    Raises:
        CheckpointError: the model is missing, damaged or not supported.
        ConfigError: a setting does not fit the model or the device.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: Callable[[str, float], None] = lambda stage, fraction: None,
        pulse: Pulse | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._pulse = Pulse() if pulse is None else pulse
        self._between = _nothing
        directory = resolve_model(config.model, on_progress)
        model_config = read_model_config(directory)
        defaults = read_sampling_defaults(directory)
        family = family_of(model_config.architecture)
        max_model_len = _max_model_len(config.max_model_len, model_config)
        if model_config.quantization is not None and config.quantization is not Quantization.NONE:
            raise ConfigError(
                f"quantization is {config.quantization.value}, but the weights of {directory} are "
                f"quantised already ({model_config.quantization.layout.value}); leave it at none"
            )
        self._device, ops = _select_device(config.device, config.batch_invariant)
        kv_cache_dtype = _kv_cache_dtype(config.kv_cache_dtype, model_config, ops)
        self.batch_invariant = ops.batch_invariant
        if self._device.type == "cpu":
            _set_num_threads(config.num_threads)

        wanted = model_config.dtype if config.dtype is Dtype.AUTO else config.dtype
        source = WeightSource(
            directory,
            None if wanted is None else _TORCH_DTYPES[wanted],
            self._device,
            lambda fraction: on_progress("loading weights", fraction),
            None if config.adapter is None else Adapter(Path(config.adapter)),
            model_config.quantization,
            SCHEMES.get(config.quantization),
        )
        if _quantization_of(model_config, config) is not None and ops.name.startswith("cpu"):
            log.warning(
                "the CPU kernels multiply quantised weights as bfloat16, and hold them so: they "
                "take as much memory and time as bfloat16 weights"
            )
        with torch.inference_mode():
            self._model: Model = family(model_config, ops, source, max_model_len=max_model_len)
            # 16-bit activations would cost a CPU conversions and gain it nothing.
            act = torch.float32 if self._device.type == "cpu" else source.dtype
            kv_dtype = kv_cache_dtype or source.dtype
            limits = first_limits(
                config.max_num_tokens,
                config.max_num_seqs,
                on_gpu=self._device.type == "cuda",
                token_bytes=kv_block_bytes(model_config, 1, kv_dtype),
                free_bytes=config.kv_memory_bytes or available_bytes(self._device),
            )
            max_num_tokens, max_rows = limits.max_num_tokens, limits.max_rows
            self._work = Workspace(
                model_config,
                max_num_tokens,
                max_rows,
                act,
                self._device,
                beat=self._beat,
            )
            self._cache = _allocate_cache(
                config, limits, model_config, max_model_len, kv_dtype, self._device
            )
        self.steps_ahead = _steps_ahead(config.steps_ahead, self._device)
        if recorder is None and config.cuda_graphs and self._device.type == "cuda":
            recorder = CudaRecorder(self._device)
        self._builder = BatchBuilder(
            config.block_size,
            max_num_tokens,
            max_rows,
            max_model_len,
            self._device,
            self.steps_ahead,
            keeps_draws=recorder is not None,
        )
        self._sampler = Sampler(
            ops, model_config.vocab_size, model_config.eos_token_ids, max_rows, self._device
        )
        self.info = ModelInfo(
            name=config.served_name or _name_of(config.model),
            max_model_len=max_model_len,
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            num_parameters=self._model.num_parameters,
            dtype=str(source.dtype).removeprefix("torch."),
            device=str(self._device),
            block_size=config.block_size,
            num_blocks=self._cache.num_blocks,
            defaults=defaults,
            quantization=_quantization_of(model_config, config),
            kv_cache_dtype=None if kv_cache_dtype is None else KvCacheDtype.FP8.value,
        )
        on_progress("warming up", 0.0)
        self._graphs: Graphs | None = None
        warm_up(self.step, self.info, min(32, max_num_tokens, max_model_len - 1))
        if recorder is not None:
            max_blocks = -(-max_model_len // config.block_size)
            self._resident = Resident(
                ops, self._sampler, max_rows, max_blocks, self._device, self.steps_ahead
            )
            self._graphs = self._record(
                recorder,
                bucket_sizes(max_rows),
                lambda fraction: on_progress("recording steps", fraction),
            )
        self.limits = self._measure(limits, config) if self._device.type == "cuda" else limits
        on_progress("ready", 1.0)

    def step(self, plan: Plan) -> StepOutput:
        """Compute the plan's rows and draw a token for those that sample."""
        return self.launch(plan).collect()

    @torch.inference_mode()
    def launch(self, plan: Plan, between: Callable[[], None] = _nothing) -> LaunchedStep:
        """Begin with a step; on a CPU, which has nobody else to do it, this computes all of it.

        ``between`` is called after each half of a layer and may raise: then the step was not
        computed, and what it wrote to blocks is written again by whatever step computes these
        positions.
        """
        arrivals = Arrivals(self._device)
        if not plan.rows:
            return LaunchedStep(arrivals, None, {})
        self._between = between
        self._pulse.begin(plan.num_tokens)
        if self._graphs is not None and plan.only_decodes:
            return LaunchedStep(arrivals, self._replay(self._graphs, plan, arrivals), {})
        batch = self._builder.build(plan)
        self._sampler.enter(batch)
        self._sampler.fill(batch)
        hidden = self._model.hidden(batch, self._cache, self._work)  # [W, E]
        logits = self._logits(hidden, 0, batch.num_samples)
        drawn = self._sampler.sample(batch, logits, arrivals)
        prompts = self._sampler.prompt_logprobs(
            batch,
            lambda start, end: self._logits(hidden, start, end),
            len(self._work.logits),
            arrivals,
        )
        return LaunchedStep(arrivals, drawn, prompts)

    def _replay(self, graphs: Graphs, plan: Plan, arrivals: Arrivals) -> Drawn:
        rows = self._builder.decode(plan)
        self._sampler.enter(rows)
        self._resident.update(rows)
        num_rows = len(plan.rows)
        graphs.replay(num_rows)
        return Drawn(arrivals.bring(self._resident.drawn[:num_rows], reused=True), None, [])

    @torch.inference_mode()
    def _record(
        self, recorder: Recorder, sizes: list[int], on_progress: Callable[[float], None]
    ) -> Graphs:
        def decode(size: int) -> None:
            hidden = self._model.hidden(self._resident.batch(size), self._cache, self._work)
            self._resident.draw(self._logits(hidden, 0, size))

        return Graphs(recorder, decode, sizes, on_progress)

    def _measure(self, limits: Limits, config: EngineConfig) -> Limits:
        """Measure steps, and choose how large they become where the settings leave it open."""
        costs = measure(self.step, self.info, limits)
        self.info = structs.replace(self.info, step_costs=costs)
        for cost in costs:
            log.info(
                "a step of %d requests and %d new tokens takes %.2f ms",
                cost.num_rows, cost.num_tokens, cost.duration_s * 1e3,
            )  # fmt: skip
        if config.max_num_tokens is not None:
            return limits
        return limits._replace(max_num_tokens=choose_num_tokens(costs, limits))

    def _beat(self) -> None:
        self._pulse.beat()
        self._between()

    def _logits(self, hidden: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Logits ``[end - start, V]`` of these output rows, valid until the next call."""
        self._pulse.beat()
        out = self._work.logits[: end - start]
        self._model.logits(hidden[start:end], out)
        return out


def _steps_ahead(wanted: int | None, device: torch.device) -> int:
    return int(device.type == "cuda") if wanted is None else wanted


def _max_model_len(wanted: int | None, model: ModelConfig) -> int:
    if wanted is None:
        return model.max_context
    if wanted > model.max_context:
        raise ConfigError(
            f"max_model_len is {wanted}; this model's positions reach {model.max_context}"
        )
    return wanted


def _select_device(wanted: Device, batch_invariant: bool) -> tuple[torch.device, Ops]:
    """The device and its kernels; ``auto`` takes a GPU if both it and kernels for it are there."""
    if wanted is Device.CUDA and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch finds no GPU: use cpu, or install torch for CUDA"
        )
    if wanted is not Device.CPU and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            return device, _select_ops(device, batch_invariant)
        except BackendUnavailable as error:
            if wanted is Device.CUDA:
                raise ConfigError(f"device is cuda, but: {error}") from error
    device = torch.device("cpu")
    try:
        return device, _select_ops(device, batch_invariant)
    except BackendUnavailable as error:
        raise ConfigError(f"device is cpu, but: {error}") from error


def _select_ops(device: torch.device, batch_invariant: bool) -> Ops:
    ops = select(device.type, batch_invariant=batch_invariant)
    if batch_invariant and not ops.batch_invariant:
        raise ConfigError(
            f"batch_invariant is set, but the kernels here ({ops.name}) give a request other bits "
            "in another batch; on a CPU, a C++ compiler is needed for those that do not"
        )
    return ops


def _kv_cache_dtype(wanted: KvCacheDtype, model: ModelConfig, ops: Ops) -> torch.dtype | None:
    """What keys and values are stored as; None: as the weights are."""
    if wanted is KvCacheDtype.FP8 and not isinstance(ops, Fp8Ops):
        raise ConfigError(
            f"kv_cache_dtype is fp8, but the kernels here ({ops.name}) have no 8-bit floats, for "
            "which a GPU of compute capability 8.9 or more is needed; use auto"
        )
    stated = model.quantization is not None and model.quantization.fp8_kv_cache
    if wanted is KvCacheDtype.AUTO and not (stated and isinstance(ops, Fp8Ops)):
        return None
    return E4M3


def _set_num_threads(wanted: int | None) -> None:
    from kernels.cpu import set_num_threads

    # What torch itself still does is small, and its threads would only fight with the kernels' own;
    # where there are none of those, the next call gives torch its threads back.
    torch.set_num_threads(1)
    set_num_threads(wanted or _usable_cores())


def _usable_cores() -> int:
    """Cores this process may run on, by affinity and by a container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = cpu_limit()
    return max(1, min(cores or 1, int(limit or 1 << 16)))


def _allocate_cache(
    config: EngineConfig,
    limits: Limits,
    model: ModelConfig,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    block_bytes = kv_block_bytes(model, config.block_size, dtype)
    num_blocks = num_kv_blocks(
        block_bytes=block_bytes,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=limits.max_num_seqs,
        memory_bytes=config.kv_memory_bytes,
        available_bytes=available_bytes(device),
    )
    memory = zeroed_memory(num_blocks * block_bytes, device)
    return KVCache(model, memory, num_blocks, config.block_size, dtype)


def _quantization_of(model: ModelConfig, config: EngineConfig) -> str | None:
    if model.quantization is not None:
        return model.quantization.layout.value
    return None if config.quantization is Quantization.NONE else config.quantization.value


def _name_of(model: str) -> str:
    """``owner/model@revision`` or a directory -> ``model``."""
    return Path(model).expanduser().resolve().name.partition("@")[0]
