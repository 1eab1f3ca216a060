"""How much memory there is, and how large the KV cache becomes."""

from __future__ import annotations

import mmap

import psutil
import torch

from engine.cgroups import memory_left_bytes
from engine.errors import ConfigError

__all__ = ["available_bytes", "num_kv_blocks", "zeroed_memory"]

_CPU_SHARE = 0.5
"""Of the memory free on the machine; the server, its tools and the page cache want some too."""
_GPU_SHARE = 0.9


def available_bytes(device: torch.device) -> int:
    """Bytes this process may still take for a cache on ``device``, leaving a share to others."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    free = psutil.virtual_memory().available
    limit = memory_left_bytes()
    return int((free if limit is None else min(free, limit)) * _CPU_SHARE)


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
