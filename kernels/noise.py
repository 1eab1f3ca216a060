"""The random numbers of sampling: a hash of (seed, position, token id), in torch integer ops.

``row_keys`` folds seed and position into two 32-bit keys with the finaliser of SplitMix64
(Steele, Lea & Flood 2014); ``token_hash`` turns keys and token id into 32 bits with two rounds of
MurmurHash3's 32-bit finaliser (Appleby 2011), which are shifts, xors and low 32-bit products and so
cheap on any vector unit. All backends give these very bits. In formulas, modulo ``2^64`` and
``2^32``::

    mix64(x):  x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;  x ^= x >> 27;
               x *= 0x94D049BB133111EB;  x ^= x >> 31
    mix32(x):  x ^= x >> 16;  x *= 0x85EBCA6B;  x ^= x >> 13;  x *= 0xC2B2AE35;  x ^= x >> 16

    key            = mix64(mix64(seed + G) + (position + 1)*G)      G = 0x9E3779B97F4A7C15
    token_hash(id) = mix32(mix32(id*0x9E3779B9 + low32(key)) ^ high32(key))
"""

from __future__ import annotations

import torch

__all__ = ["row_keys", "token_hash", "uniforms"]

_LOW32 = 0xFFFFFFFF


def _signed(value: int) -> int:
    """A 64-bit constant as the int64 of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """``x`` holds 32-bit values in int64; products wrap, and their low 32 bits stay right."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW32
    return x ^ (x >> 16)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and high 32-bit keys of each row, as int64 ``[S]``, from int64 ``[S]`` inputs."""
    key = _mix64(_mix64(seeds + _GOLDEN) + (positions + 1) * _GOLDEN)
    return key & _LOW32, _shift_right(key, 32)


def token_hash(low: torch.Tensor, high: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """32 hash bits for each id, as int64; the three int64 inputs broadcast."""
    return _mix32(_mix32((ids * 0x9E3779B9 + low) & _LOW32) ^ high)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``u = (hash + 0.5) / 2^32`` of every token of every row: float64 ``[S, V]``, in (0, 1)."""
    low, high = row_keys(seeds, positions)
    ids = torch.arange(vocab_size, device=seeds.device)
    hashes = token_hash(low[:, None], high[:, None], ids[None, :])
    return (hashes.to(torch.float64) + 0.5) * 2.0**-32
