"""``python -m kernels.gpu.tuning`` within a time: the sizes of 0.6B and 8B, one op a row.

After each op ``sm_XY.toml`` in the output folder holds what was found so far over the table that
is there, ready to be put in its place.
"""

from __future__ import annotations

import contextlib
import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

from kernels.gpu import tuning
from kernels.gpu.tuning import __main__ as measuring
from kernels.gpu.tuning import capability_of, rules_of
from tests.gpu.journal import Figures
from tests.gpu.parts import Group, Row
from tests.gpu.setting import Setting

__all__ = ["groups"]

SIZES = (128, 1024, 4096, 151_936)


def groups(setting: Setting) -> list[Group]:
    """Every op that has candidates."""
    rows = (Row(op, partial(_tune, op), needs_s=20, limit_s=280) for op in measuring.CASES)
    return [Group("op", tuple(rows))]


def _tune(op: str, setting: Setting) -> Figures:
    case = measuring.CASES[op]
    sizes = tuple(size for size in case.sizes if size in SIZES) or case.sizes[-1:]
    capability = capability_of(setting.device)
    path = setting.out / f"sm_{capability[0]}{capability[1]}.toml"
    tables = dict(rules_of(capability))
    if path.exists():
        read = tomllib.loads(path.read_text(encoding="utf-8"))
        tables = {name: tuple(tuning._rule(name, rule) for rule in read[name]) for name in read}
    with contextlib.ExitStack() as stack:
        if setting.dry:
            sizes = (64,)
            stack.enter_context(_without_gpu())
            case = _Few(**vars(case))
        stack.enter_context(mock.patch.dict(measuring.CASES, {op: replace(case, sizes=sizes)}))
        tables[op] = measuring._measured(op, setting.device)
    path.write_text(measuring.render(capability, tables), encoding="utf-8")
    return {"ops": op, "file": path.name}


class _Few(measuring.Case):
    """A case of which a dry run tries two candidates."""

    def candidates(self, device_name: str) -> Iterator[Any]:
        return itertools.islice(super().candidates(device_name), 2)


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    """In a dry run each candidate runs once, and all take as long."""

    def once(call: Any, **_: object) -> float:
        call()
        return 1.0

    with (
        mock.patch("triton.testing.do_bench", once),
        mock.patch("torch.cuda.get_device_name", return_value="dry run"),
        mock.patch.object(measuring, "_ROWS", 2),
    ):
        yield
