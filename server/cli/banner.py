"""What ``millrace serve`` prints when it is ready."""

from __future__ import annotations

from engine import ModelInfo
from server.cli.version import version
from server.settings import ServerSettings
from server.store import StoreKind

__all__ = ["banner"]


def banner(
    settings: ServerSettings,
    address: tuple[str, int],
    info: ModelInfo,
    store: StoreKind,
    where: str,
) -> str:
    """Return the lines that say where the server is, what it serves and what it keeps."""
    url = _url(*address)
    page = f"{url}/"
    if not (settings.page_dir / "index.html").is_file():
        page = "not built: run `make page` (needs Node.js 20 or newer) and start again"
    kind = info.dtype if info.quantization is None else f"{info.quantization} and {info.dtype}"
    if info.kv_cache_dtype is not None:
        kind += f" (KV cache {info.kv_cache_dtype})"
    model = (
        f"{info.name}: {_count(info.num_parameters)} parameters, {kind} on {info.device}, "
        f"context {info.max_model_len:,} tokens"
    )
    lines = [
        f"Millrace {version()} is ready",
        f"  page    {page}",
        f"  API     {url}/v1",
        f"  model   {model}",
        f"  store   {_store(store, where)}",
    ]
    if settings.api_key_file is not None:
        lines.append(f"  keys    required, from {settings.api_key_file}")
    return "\n".join(lines)


def _store(kind: StoreKind, where: str) -> str:
    match kind:
        case StoreKind.REDIS:
            return f"Redis at {where}"
        case StoreKind.CHILD:
            return f"{where}: conversations end with this server (keep them with --redis-url)"
        case StoreKind.MEMORY:
            return (
                "IN MEMORY ONLY (fakeredis, for trying things out): conversations are lost when "
                "the server stops.\n          Install redis-server, or give --redis-url"
            )


def _url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104  (compared, not bound)
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
