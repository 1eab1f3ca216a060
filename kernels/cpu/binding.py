"""The C functions of the compiled library, as Python callables on addresses and plain numbers."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

__all__ = ["NativeLibrary"]

# p: pointer, i: int, L: int64, f: float. A leading "!" means that bad values are reported, "=" that
# an int comes back.
_SIGNATURES = {
    "embed": "!ipppLLL",
    "rms_norm": "ipppLLf",
    "add_rms_norm": "ippppLLf",
    "qk_norm_rope_write": "!iipppppppppLLLLLLLf",
    "paged_attention": "!ippppppp" + "L" * 8 + "f",
    "swiglu": "ppLL",
    "rounds": "=i",
    "pack_linear": "ipLLp",
    "linear": "ipppLLL",
    "gather_rows": "!pppLLL",
    "apply_penalties": "!pppppppLLL",
    "add_bias": "!ppppLLL",
    "apply_token_mask": "ppLL",
    "sample": "ppppppppLL",
    "logprobs": "!pppppLLL",
    "token_hashes": "pLLLL",
    "set_num_threads": "i",
}
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "L": ctypes.c_int64,
    "f": ctypes.c_float,
}


class NativeLibrary:
    """A loaded library; each op of ``_SIGNATURES`` is an attribute with a leading underscore.

    Args:
        path: the compiled library.
    """

    # Set in __init__; ctypes functions take and give plain numbers.
    _embed: Any
    _rms_norm: Any
    _add_rms_norm: Any
    _qk_norm_rope_write: Any
    _paged_attention: Any
    _swiglu: Any
    _rounds: Any
    _pack_linear: Any
    _linear: Any
    _gather_rows: Any
    _apply_penalties: Any
    _add_bias: Any
    _apply_token_mask: Any
    _sample: Any
    _logprobs: Any
    _token_hashes: Any
    _set_num_threads: Any

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for op, signature in _SIGNATURES.items():
            function = getattr(library, f"millrace_{op}")
            function.restype = {"!": ctypes.c_int64, "=": ctypes.c_int}.get(signature[0])
            function.argtypes = [_TYPES[letter] for letter in signature.lstrip("!=")]
            setattr(self, f"_{op}", function)
