"""Compiles the C++ sources once and keeps the library in the user's cache.

The library's name holds a hash of sources, flags, compiler and processor, so a new version, an
upgraded compiler or a home directory shared by different machines each get their own. Builders may
race: one builds under a lock, and the finished file appears by one rename.

``python -m kernels.cpu`` builds ahead of time and prints the path. An image that is built on
one machine and run on another, without a compiler, sets ``MILLRACE_KERNELS_MARCH=x86-64-v3`` for
both steps.

Environment: ``MILLRACE_CXX`` or ``CXX`` name the compiler, ``MILLRACE_CACHE_DIR`` the cache
(default ``$XDG_CACHE_HOME/millrace`` or ``~/.cache/millrace``).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["BuildError", "compile_library", "cpu_features", "library"]

_SOURCE_DIR = Path(__file__).resolve().parent
# No contraction: a fused multiply-add where the compiler likes would make bits depend on its mood.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
          "-fno-trapping-math", "-fvisibility=hidden", "-pthread")  # fmt: skip
_COMPILE_TIMEOUT_S = 300.0
_V3 = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"))
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_MARCH_FEATURES = {"native": frozenset[str](), "x86-64-v3": _V3, "x86-64-v4": _V4}


class BuildError(RuntimeError):
    """There is no library and none can be built; the message says why."""


def cpu_features() -> frozenset[str]:
    """What the processor can do, as the kernel names it; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _march() -> str:
    """The wanted instruction set, which this processor must have."""
    march = os.environ.get("MILLRACE_KERNELS_MARCH", "native")
    if march not in _MARCH_FEATURES:
        known = ", ".join(_MARCH_FEATURES)
        raise BuildError(f"MILLRACE_KERNELS_MARCH must be one of {known}; got {march!r}")
    missing = _MARCH_FEATURES[march] - cpu_features()
    if missing:
        raise BuildError(f"this processor lacks {', '.join(sorted(missing))} of {march}")
    return march


def _compiler() -> str:
    """The path of a C++ compiler."""
    named = os.environ.get("MILLRACE_CXX") or os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler: {named or 'none of c++, g++, clang++'} not found")


def _run(command: list[str], cwd: Path) -> str:
    """What the command prints."""
    try:
        done = subprocess.run(  # noqa: S603 - our own command line
            command,
            check=False,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _key(march: str) -> str:
    """The hash in the library's name.

    A library for this very machine depends on compiler and processor too; a portable one must be
    found on machines without that compiler.
    """
    digest = hashlib.sha256()
    for path in sorted((*_SOURCE_DIR.glob("*.cpp"), *_SOURCE_DIR.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((_FLAGS, march, platform.machine())).encode())
    if march == "native":
        version = _run([_compiler(), "--version"], _SOURCE_DIR)
        digest.update(repr((version, sorted(cpu_features()))).encode())
    return digest.hexdigest()[:20]


def _private_dir() -> Path:
    """A directory that only this user can write: what is in it will be executed."""
    named, xdg = os.environ.get("MILLRACE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    base = Path(named) if named else Path(xdg or Path.home() / ".cache") / "millrace"
    path = base / "kernels"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if os.access(path, os.W_OK) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="millrace-kernels-"))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; where the file system cannot lock, by all."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(march: str, target: Path, *flags: str) -> None:
    """Build all sources into ``target``, which appears whole or not at all.

    Args:
        march: the instruction set, as the compiler names it.
        target: the library's path.
        flags: more flags for the compiler.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        sources = sorted(_SOURCE_DIR.glob("*.cpp"))
        commands = [
            [
                compiler,
                *_FLAGS,
                f"-march={march}",
                *flags,
                "-c",
                str(source),
                "-o",
                f"{source.stem}.o",
            ]
            for source in sources
        ]
        with ThreadPoolExecutor(max_workers=min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(lambda command: _run(command, work), commands))
        objects = [f"{source.stem}.o" for source in sources]
        _run([compiler, "-shared", "-pthread", *objects, "-o", "library.so"], work)
        (work / "library.so").rename(target)


def library() -> Path:
    """The compiled library of this machine, built if it is not there yet (some seconds).

    Raises:
        BuildError: no compiler, or it failed; the message says which and how.
    """
    march = _march()
    directory = _private_dir()
    target = directory / f"kernels-{march}-{_key(march)}.so"
    if target.exists():
        return target
    with _lock(directory / ".lock"):
        if not target.exists():
            compile_library(march, target)
    return target
