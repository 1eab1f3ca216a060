"""Limits of control groups, read from made-up file trees of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cgroups import cpu_limit, memory_left_bytes


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "fs"


def test_memory_version_2(membership: Path, root: Path) -> None:
    membership.write_text("0::/outer/inner\n")
    stat = "anon 5\ninactive_file 100\n"
    inner, outer = root / "outer" / "inner", root / "outer"
    write(inner, memory__max="max", memory__current="700", memory__stat=stat)
    assert memory_left_bytes(membership, root) is None
    write(outer, memory__max="1000", memory__current="700", memory__stat=stat)
    assert memory_left_bytes(membership, root) == 400
    write(inner, memory__max="750")
    assert memory_left_bytes(membership, root) == 150
    write(inner, memory__max="7")
    assert memory_left_bytes(membership, root) == 0
    write(inner, memory__max="nonsense")
    assert memory_left_bytes(membership, root) == 400


def test_memory_version_1(membership: Path, root: Path) -> None:
    membership.write_text("3:cpu,cpuacct:/x\n2:memory:/job\n")
    write(
        root / "memory" / "job",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="900",
        memory__stat="total_inactive_file 50\n",
    )
    assert memory_left_bytes(membership, root) == 150
    write(root / "memory" / "job", memory__limit_in_bytes=str((1 << 63) - 4096))
    assert memory_left_bytes(membership, root) is None


def test_processors_version_2(membership: Path, root: Path) -> None:
    membership.write_text("0::/a/b\n")
    write(root / "a" / "b", cpu__max="max 100000\n")
    assert cpu_limit(membership, root) is None
    write(root / "a", cpu__max="150000 100000\n")
    assert cpu_limit(membership, root) == 1.5


def test_processors_version_1(membership: Path, root: Path) -> None:
    membership.write_text("3:cpu,cpuacct:/x\n")
    write(root / "cpu,cpuacct" / "x", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cpu_limit(membership, root) is None
    write(root / "cpu,cpuacct" / "x", cpu__cfs_quota_us="400000")
    assert cpu_limit(membership, root) == 4


def test_no_control_groups(membership: Path, root: Path) -> None:
    assert memory_left_bytes(membership, root) is None
    assert cpu_limit(membership, root) is None
    membership.write_text("0::/gone\n")
    assert memory_left_bytes(membership, root) is None
    assert cpu_limit(membership, root) is None
