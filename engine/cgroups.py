"""What Linux control groups, and so containers, leave to this process.

Both versions are read (https://docs.kernel.org/admin-guide/cgroup-v2.html and
.../cgroup-v1/). A limit of any parent group counts. Where nothing can be read there is no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_limit", "memory_left_bytes"]

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as a huge number."""


def memory_left_bytes(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> int | None:
    """Bytes until the nearest memory limit; None: no limit. Droppable page cache counts as free."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    left = [
        _memory_left(group, *names[version])
        for version, group in _groups("memory", membership, root)
    ]
    return min([room for room in left if room is not None], default=None)


def cpu_limit(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> float | None:
    """Processors' worth of time this process may use; None: no limit."""
    limits = [
        _cpu_limit_v1(group) if version == 1 else _cpu_limit_v2(group)
        for version, group in _groups("cpu", membership, root)
    ]
    return min([limit for limit in limits if limit is not None], default=None)


def _groups(controller: str, membership: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, directory) of this process's groups and all their parents."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            version, base = 2, root
        elif controller in controllers.split(","):
            version, base = 1, root / controllers
            if not base.exists():
                base = root / controller
        else:
            continue
        group = base / path.lstrip("/")
        yield version, group
        while group != base and base in group.parents:
            group = group.parent
            yield version, group


def _memory_left(group: Path, limit: str, usage: str, droppable: str) -> int | None:
    try:
        text = (group / limit).read_text().strip()
        if text == "max" or int(text) >= _UNLIMITED_BYTES:
            return None
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(text) - used + int(stat.get(droppable, 0)))


def _cpu_limit_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _cpu_limit_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        return quota / int((group / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
