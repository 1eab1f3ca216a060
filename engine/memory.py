"""How much memory there is, and how large the KV cache becomes."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import torch

from engine.errors import ConfigError

__all__ = ["available_bytes", "cgroup_available_bytes", "num_kv_blocks", "zeroed_memory"]

_CPU_SHARE = 0.5
"""Of the memory free on the machine; the server, its tools and the page cache want some too."""
_GPU_SHARE = 0.9
_UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes "no limit" as a huge number."""


def available_bytes(device: torch.device) -> int:
    """Bytes this process may still take for a cache on ``device``, leaving a share to others."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    free = psutil.virtual_memory().available
    limit = cgroup_available_bytes()
    return int((free if limit is None else min(free, limit)) * _CPU_SHARE)


def cgroup_available_bytes(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes left under the memory limits of this process's control groups; None: no limit.

    Reads version 2 and version 1 (https://docs.kernel.org/admin-guide/cgroup-v2.html). A limit of
    any parent counts. Page cache that can be dropped counts as free.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers == "":
            base, limit, usage, stat_key = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in names:
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            stat_key = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        while True:
            room = _room(group, limit, usage, stat_key)
            if room is not None:
                left.append(room)
            if group == base or base not in group.parents:
                break
            group = group.parent
    return min(left, default=None)


def _room(group: Path, limit: str, usage: str, stat_key: str) -> int | None:
    """Bytes left in one group; None if it has no limit or is not visible from here."""
    try:
        text = (group / limit).read_text().strip()
        if text == "max" or int(text) >= _UNLIMITED_BYTES:
            return None
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(text) - used + int(stat.get(stat_key, 0)))


def num_kv_blocks(
    *,
    block_bytes: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    memory_bytes: int | None,
    available_bytes: int,
) -> int:
    """Blocks in the pool, the scratch block included.

    Args:
        block_bytes: memory of one block.
        block_size: tokens in a block.
        max_model_len: most tokens of one request.
        max_num_seqs: most requests at once; more blocks than all of them can fill are not made.
        memory_bytes: what the configuration gives the cache; None: ``available_bytes``.
        available_bytes: what the device can give.

    Raises ConfigError when not even one request of full length fits.
    """
    blocks_per_request = -(-max_model_len // block_size)
    granted = available_bytes if memory_bytes is None else memory_bytes
    least = (blocks_per_request + 1) * block_bytes
    fitting_len = max(0, granted // block_bytes - 1) * block_size
    if granted < least:
        source = "free on this device" if memory_bytes is None else "in kv_memory_bytes"
        raise ConfigError(
            f"the KV cache needs {least} bytes for one request of max_model_len {max_model_len}, "
            f"but {granted} bytes are {source}, which is enough for {fitting_len} tokens; lower "
            "max_model_len or raise kv_memory_bytes"
        )
    return min(granted // block_bytes, max_num_seqs * blocks_per_request + 1)


def zeroed_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """``num_bytes`` zero bytes: uint8 ``[num_bytes]``.

    On a CPU the system hands out the pages only when they are touched, and in large ones where it
    can, so that a cache for rare long contexts costs nothing until there is one.

    Raises ConfigError when the device does not have them.
    """
    try:
        if device.type != "cpu":
            return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        # Private, because the system backs shared memory with small pages only.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, num_bytes, flags=flags)
    except (OSError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"{device} cannot give the KV cache {num_bytes} bytes; lower kv_memory_bytes "
            f"or max_model_len ({error})"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
