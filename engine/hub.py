"""Find a model's files: the bundled model, a directory, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import DEFAULT_MODEL
from engine.errors import CheckpointError

__all__ = ["resolve_model"]

Progress = Callable[[str, float], None]

_WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
_UNWANTED = ("original/*", "*/*.safetensors", "onnx/*")  # the same weights in other formats
_HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?")
_BUNDLED = Path(__file__).parent / "assets"


def resolve_model(name: str, on_progress: Progress | None = None) -> Path:
    """Return the directory with a model's files, after downloading them if need be.

    Args:
        name: the bundled model's name, a directory, or a name on the hub (``owner/model``, with
            ``@revision`` for another branch, tag or commit than the main one).
        on_progress: called with what is going on and the finished fraction, 0 to 1.

    Raises CheckpointError when there is no such model or it cannot be had.
    """
    if name == DEFAULT_MODEL:
        return _checked(_BUNDLED / DEFAULT_MODEL)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _checked(path)
    if name and path.exists():
        raise CheckpointError(
            f"{name} is a file; give the directory with config.json and the .safetensors files"
        )
    if _looks_like_path(name):
        raise CheckpointError(f"there is no directory {name!r} (looked for {path.absolute()})")
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is neither a directory nor a hub name such as Qwen/Qwen3-0.6B"
        )
    return _checked(_download(name, on_progress))


def _looks_like_path(name: str) -> bool:
    return (
        not name
        or name.startswith((".", "/", "~"))
        or name.endswith(("/", ".safetensors", ".gguf", ".bin", ".pt"))
        or name.partition("@")[0].count("/") > 1
        or "\\" in name
    )


def _checked(directory: Path) -> Path:
    if not directory.is_dir():
        raise CheckpointError(f"the bundled model is not installed: there is no {directory}")
    if not (directory / "config.json").is_file():
        held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{directory} is not a checkpoint: no config.json in it (but {held})")
    return directory


def _download(name: str, on_progress: Progress | None) -> Path:
    # Imported here: half a second that a model on disk does not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo_id, _, revision = name.partition("@")
    report = _Report(repo_id, on_progress)
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            tqdm_class=_bar_class(report),
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither a directory nor a hub name such as Qwen/Qwen3-0.6B: {error}"
        ) from error
    except Exception as error:
        raise CheckpointError(_why(name, error)) from error
    return Path(folder)


def _why(name: str, error: Exception) -> str:
    """Say in one sentence why a download failed and what would help."""
    from huggingface_hub import errors

    start = f"the model {name} cannot be downloaded: "
    match error:
        case errors.GatedRepoError():
            return f"{start}its owner asks for consent; accept it on the hub and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            return (
                f"{start}no directory and no hub model has this name (private ones need HF_TOKEN)"
            )
        case errors.RevisionNotFoundError():
            return f"{start}it has no such revision"
        case errors.LocalEntryNotFoundError() if _is_offline():
            return f"{start}HF_HUB_OFFLINE is set and the model is not in the cache"
        case errors.LocalEntryNotFoundError():
            reason = _first_line(error.__cause__ or error)
            return f"{start}the hub cannot be reached and the model is not in the cache ({reason})"
        case errors.HfHubHTTPError() if error.response is not None:
            return f"{start}the hub answered with status {error.response.status_code}"
        case OSError() if error.errno is not None:
            return f"{start}{error.strerror} ({error.filename or 'disk'})"
        case _:
            return f"{start}{_first_line(error)}"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Report:
    """Turns the bytes of several bars in several threads into one fraction that only grows."""

    def __init__(self, repo_id: str, on_progress: Progress | None) -> None:
        self._repo_id = repo_id
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._fraction = 0.0

    def update(self, done: float, total: float) -> None:
        """Report ``done`` of ``total`` bytes."""
        if self._on_progress is None or total <= 0:
            return
        with self._lock:
            self._fraction = max(self._fraction, min(1.0, done / total))
            stage = f"downloading {self._repo_id} ({done / 1e6:,.0f} of {total / 1e6:,.0f} MB)"
            self._on_progress(stage, self._fraction)


def _bar_class(report: _Report) -> Any:
    """Return a tqdm class that draws nothing and reports the bytes written to disk."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    class Bar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            for key in ("name", "disable"):
                kwargs.pop(key, None)
            super().__init__(*args, **kwargs, file=_Nowhere())

        def display(self, *args: Any, **kwargs: Any) -> bool:
            if self.unit == "B":
                report.update(float(self.n), float(self.total or 0))
            return True

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            self.display()
            return shown

    return Bar


class _Nowhere:
    """A text file that swallows what a bar writes."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
