"""Block sizes, warps and stages of each GPU kernel, by architecture and shape.

The data lies in ``kernels/gpu/configs/sm_*.toml``: for each op a list of rules, of which the first
whose bounds hold is taken. A bound ``max_H = 1024`` holds for shapes with ``H <= 1024``; keys in
upper case are the kernel's constants::

    [[rms_norm]]
    max_H = 1024
    ROWS = 8
    num_warps = 4
    num_stages = 1
    measured_on = []        # names of the devices it won on; empty: untuned, a considered guess

An architecture without a file of its own gets the newest one below it, else the oldest there is.
``python -m kernels.gpu.tuning`` measures candidates on the device at hand and writes its file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from types import MappingProxyType

import torch

from kernels.interface import KernelError

__all__ = ["Capability", "Config", "Rule", "capability_of", "config", "rules_of", "trying"]

Capability = tuple[int, int]
_INTERPRETED: Capability = (9, 0)  # without a device, the interpreter tries Hopper's numbers


@dataclass(frozen=True)
class Config:
    """How to launch one kernel on one kind of shape.

    Attributes:
        constants: the kernel's own block sizes, by the names of its parameters.
        num_warps: warps of 32 threads in a program.
        num_stages: stages of the software pipeline.
        measured_on: names of the devices on which this was the fastest; empty if untuned.
    """

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int
    measured_on: tuple[str, ...] = field(default=())

    @property
    def launch(self) -> dict[str, int]:
        """Everything that a launch takes by keyword."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __getitem__(self, constant: str) -> int:
        """One of the constants."""
        return self.constants[constant]


@dataclass(frozen=True)
class Rule:
    """A config and the largest shape it is for."""

    bounds: Mapping[str, int]
    config: Config

    def holds(self, shape: Mapping[str, int]) -> bool:
        """True if no size of ``shape`` is beyond its bound."""
        return all(shape[name] <= most for name, most in self.bounds.items())


@cache
def capability_of(device: torch.device) -> Capability:
    """The compute capability of a CUDA device; that of Hopper for the interpreter's CPU."""
    if device.type != "cuda":
        return _INTERPRETED
    return torch.cuda.get_device_capability(device)


_trial: ContextVar[tuple[str, Config] | None] = ContextVar("_trial", default=None)


@contextmanager
def trying(op: str, candidate: Config) -> Iterator[None]:
    """Within the block, every shape of ``op`` gets this config: for measuring."""
    token = _trial.set((op, candidate))
    try:
        yield
    finally:
        _trial.reset(token)


def config(op: str, capability: Capability, **shape: int) -> Config:
    """The config of ``op`` for a device of this capability and a shape given by letters.

    Raises KernelError if the table has no rule for it.
    """
    trial = _trial.get()
    return trial[1] if trial and trial[0] == op else _config(op, capability, **shape)


@lru_cache(maxsize=4096)
def _config(op: str, capability: Capability, **shape: int) -> Config:
    for rule in rules_of(capability).get(op, ()):
        if rule.holds(shape):
            return rule.config
    raise KernelError(f"no tuning rule for {op} on sm_{capability[0]}{capability[1]} with {shape}")


@cache
def rules_of(capability: Capability) -> Mapping[str, tuple[Rule, ...]]:
    """All rules for a capability, by op."""
    files = {_capability_in(name): name for name in _data_files()}
    known = sorted(files)
    below = [one for one in known if one <= capability]
    text = _folder().joinpath(files[below[-1] if below else known[0]]).read_text(encoding="utf-8")
    return MappingProxyType(
        {op: tuple(_rule(op, entry) for entry in entries) for op, entries in _parse(text).items()}
    )


def _folder() -> resources.abc.Traversable:
    return resources.files("kernels.gpu") / "configs"


def _data_files() -> list[str]:
    return [path.name for path in _folder().iterdir() if path.name.startswith("sm_")]


def _capability_in(name: str) -> Capability:
    """``sm_90.toml`` -> ``(9, 0)``."""
    digits = name.removeprefix("sm_").removesuffix(".toml")
    return int(digits[:-1]), int(digits[-1])


def _parse(text: str) -> Mapping[str, list[dict[str, object]]]:
    return tomllib.loads(text)


def _rule(op: str, entry: Mapping[str, object]) -> Rule:
    numbers = {name: value for name, value in entry.items() if isinstance(value, int)}
    devices = entry.get("measured_on", [])
    unknown = sorted(
        name
        for name in entry
        if not (name.isupper() or name.startswith("max_"))
        and name not in ("num_warps", "num_stages", "measured_on")
    )
    if unknown or not isinstance(devices, list):
        raise KernelError(f"tuning rule of {op}: cannot read {unknown or devices}")
    constants = {name: value for name, value in numbers.items() if name.isupper()}
    bounds = {n.removeprefix("max_"): most for n, most in numbers.items() if n.startswith("max_")}
    made = Config(
        MappingProxyType(constants),
        numbers.get("num_warps", 4),
        numbers.get("num_stages", 1),
        tuple(str(device) for device in devices),
    )
    return Rule(MappingProxyType(bounds), made)
