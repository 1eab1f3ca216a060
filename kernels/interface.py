"""What every backend offers: the names, the shapes and what each op means.

Letters used throughout: ``T`` new tokens of this step over all requests, ``R`` requests (rows),
``S`` rows that sample, ``H`` hidden width, ``D`` head width, ``Hq``/``Hkv`` query and key-value
heads, ``V`` vocabulary, ``N`` cache blocks of ``B`` tokens, ``I`` feed-forward width, ``O`` output
features.

Rules that hold for every op:

* Tensors are contiguous, on one device, and every output is written in place into a tensor that
  the caller gives. There are no Python lists of sequences and no optional tensors, so a call can be
  recorded into a CUDA graph: sizes come from shapes, lengths from device tensors.
* ``act`` is the activation dtype of a call, one of float32, bfloat16, float16; all activations of a
  call share it. Weights (``W``) and cache (``C``) may each have any of the three, independently.
* Arithmetic is done in float32 or better and rounded once, on the store. Only products may round
  what they multiply, where ``rounds_to`` says so.
* Wrong shapes, dtypes or layouts raise ``KernelError``. Wrong *values* (an id outside the table, a
  slot outside the cache) raise it too where looking at them costs no device synchronisation.
* An op with a zero-sized batch is a no-op.

Padding, for fixed-shape graphs: padded tokens write their keys and values to block 0, which holds
no real data; padded requests have zero new tokens; entries of the penalty and bias lists whose row
is ``>= S`` are ignored; padded sampling rows may hold any logits, NaN included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from kernels.quantised import QuantisedWeight

__all__ = ["BackendUnavailable", "KernelError", "Ops", "PackedLinear"]


class KernelError(ValueError):
    """An op was called with arguments it cannot work on; the message says which."""


class BackendUnavailable(RuntimeError):
    """No kernel backend can serve the wanted device on this machine."""


class PackedLinear(Protocol):
    """A weight matrix in the layout its backend likes best; opaque but for its sizes."""

    @property
    def out_features(self) -> int:
        """Rows of the weight, ``O``."""

    @property
    def in_features(self) -> int:
        """Columns of the weight, ``H``."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory the packed form holds."""


class Ops(Protocol):
    """The op set of one backend. Stateless but for the packed weights that the caller keeps."""

    @property
    def name(self) -> str:
        """Which backend this is, for logs and metrics."""

    @property
    def batch_invariant(self) -> bool:
        """True if a row has the same bits alone, in any batch, and in any chunking of a prompt."""

    def rounds_to(self, stored: torch.dtype) -> torch.dtype | None:
        """What meets weights or a cache of dtype ``stored`` in a product is rounded to this first.

        That is ``x`` of ``linear``, and in ``paged_attention`` the queries and the weights of the
        softmax, before they are divided by their sum. None: nothing is rounded, but for the weights
        of the softmax, which may be to act where act is the cache's dtype too. Sums are float32 or
        better in any case.
        """

    def embed(self, out: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> None:
        """``out[t] = table[ids[t]]``.

        Args:
            out: ``[T, H]`` act.
            ids: ``[T]`` int64, each in ``[0, V)``.
            table: ``[V, H]`` W.

        Cost: reads ``T*H*sizeof(W)`` bytes, writes ``T*H*sizeof(act)``.
        """

    def rms_norm(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """``out = x / sqrt(mean(x^2) + eps) * weight`` by row (Zhang & Sennrich 2019).

        Args:
            out: ``[T, H]`` act; may be ``x`` itself.
            x: ``[T, H]`` act.
            weight: ``[H]`` W.
            eps: added to the mean square.

        Cost: ``2*T*H*sizeof(act)`` bytes, about ``4*T*H`` operations.
        """

    def add_rms_norm(
        self,
        out: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """``residual += x`` in place, then ``out = rms_norm(residual, weight, eps)``.

        The norm is of the residual as stored, that is after rounding to act.

        Args:
            out: ``[T, H]`` act; may be ``x`` but not ``residual``.
            residual: ``[T, H]`` act, updated in place.
            x: ``[T, H]`` act.
            weight: ``[H]`` W.
            eps: added to the mean square.

        Cost: ``4*T*H*sizeof(act)`` bytes, about ``5*T*H`` operations.
        """

    def qk_norm_rope_write(
        self,
        q_out: torch.Tensor,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        eps: float,
    ) -> None:
        """Normalise each query and key head, rotate both, and store keys and values in the cache.

        RMSNorm is over ``D`` by head (Qwen3). The rotary embedding pairs element ``i`` with
        ``i + D/2`` (the "rotate half" convention of Hugging Face): with ``c, s`` from the row of
        ``cos_sin`` at the token's position, ``y[i] = x[i]*c[i] - x[i+D/2]*s[i]`` and
        ``y[i+D/2] = x[i+D/2]*c[i] + x[i]*s[i]``. Norm and rotation are one computation, without
        rounding between them.

        Args:
            q_out: ``[T, Hq, D]`` act.
            qkv: ``[T, (Hq + 2*Hkv)*D]`` act: all query heads, then key heads, then value heads.
            q_weight: ``[D]`` W.
            k_weight: ``[D]`` W.
            cos_sin: ``[P, D]`` float32: ``D/2`` cosines, then ``D/2`` sines of each position.
            positions: ``[T]`` int64, each in ``[0, P)``.
            slots: ``[T]`` int64, ``block*B + offset``; padded tokens point into block 0.
            k_cache: ``[N, Hkv, B, D]`` C, written at ``slots``.
            v_cache: ``[N, Hkv, B, D]`` C, written at ``slots``.
            eps: added to the mean square.

        Cost: reads ``T*(Hq+2*Hkv)*D*sizeof(act)`` bytes, writes ``T*Hq*D*sizeof(act)`` and
        ``2*T*Hkv*D*sizeof(C)``.
        """

    def plan_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        most_new: int | None = None,
    ) -> object | None:
        """What a backend finds out about a step's attention once, for all its layers.

        Only ``paged_attention`` of the same backend knows what is in it. It holds for calls whose
        tensors have the shapes and dtypes of these and the same lengths, until the next plan.

        Args:
            q: ``[T, Hq, D]`` act; like ``k_cache``, it is asked for its shape and dtype only.
            k_cache: ``[N, Hkv, B, D]``, of any layer.
            block_tables: ``[R, max_blocks]`` int32.
            query_starts: ``[R+1]`` int32, as ``paged_attention`` will see it.
            context_lens: ``[R]`` int32, the same.
            most_new: no request has more new tokens; None: nobody knows. A backend may do less
                where they are few, and computes nothing for tokens beyond.
        """

    def paged_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        plan: object | None = None,
    ) -> None:
        """Causal attention of a ragged batch of new tokens over their requests' cached tokens.

        Request ``r`` has the new tokens ``query_starts[r] .. query_starts[r+1]-1``; the last of
        them is at position ``context_lens[r]-1`` and each sees itself and all before it. Position
        ``p`` of request ``r`` lies in block ``block_tables[r, p // B]`` at offset ``p % B``. Query
        head ``h`` reads key-value head ``h // (Hq/Hkv)``. There is no difference between prefill
        and decode.

        Args:
            out: ``[T, Hq, D]`` act; rows from ``query_starts[R]`` on are left as they are.
            q: ``[T, Hq, D]`` act.
            k_cache: ``[N, Hkv, B, D]`` C, this step's keys already written.
            v_cache: ``[N, Hkv, B, D]`` C.
            block_tables: ``[R, max_blocks]`` int32; only the blocks in use need be valid.
            query_starts: ``[R+1]`` int32, from 0, not falling, the last one at most ``T``.
            context_lens: ``[R]`` int32; ignored for requests without new tokens.
            scale: multiplies the scores, usually ``D**-0.5``.
            plan: of ``plan_attention`` for this step; None: made for this call.

        Cost: ``4*Hq*D`` operations for each (query, key) pair in sight; reads at least
        ``2*Hkv*D*sizeof(C)`` bytes for each context token of each request.
        """

    def swiglu(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """``out = silu(gate) * up`` (Shazeer 2020).

        Args:
            out: ``[T, I]`` act.
            gate_up: ``[T, 2*I]`` act: the gates, then the ups.

        Cost: ``3*T*I*sizeof(act)`` bytes.
        """

    def pack_linear(self, weight: torch.Tensor) -> PackedLinear:
        """Copy ``weight [O, H]`` W into the backend's own layout; ``weight`` may be freed after."""

    def pack_quantised(self, weight: QuantisedWeight) -> PackedLinear:
        """The same for a weight of 8 or 4 bits; ``linear`` takes it as any other.

        What it is multiplied by, and as what, is the backend's: one that has no products of such
        numbers keeps them as bfloat16, with the memory of that; one that has may round ``x`` to
        float8_e4m3fn, with one scale for each row or group of it, where the scheme is FP8.
        """

    def linear(self, out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> None:
        """``out = x @ weight.T``.

        Args:
            out: ``[T, O]`` act or float32.
            x: ``[T, H]`` act.
            packed: from this backend's ``pack_linear`` or ``pack_quantised``.

        Cost: ``2*T*H*O`` operations; reads ``O*H*sizeof(W)`` bytes at least.
        """

    def gather_rows(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """``out[s] = x[rows[s]]``.

        Args:
            out: ``[S, H]`` act.
            x: ``[T, H]`` act.
            rows: ``[S]`` int64, each in ``[0, T)``.

        Cost: ``2*S*H*sizeof(act)`` bytes.
        """

    def apply_penalties(
        self,
        logits: torch.Tensor,
        entry_rows: torch.Tensor,
        entry_ids: torch.Tensor,
        entry_output_counts: torch.Tensor,
        repetition: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
    ) -> None:
        """Penalise tokens that were seen before, in place.

        One entry for each distinct (row, token id) of a prompt or its output, ``count`` being the
        times it was *generated* (0: it stands in the prompt only). For each entry, in this order:
        ``l = l / repetition if l > 0 else l * repetition`` (Keskar et al. 2019, as in Hugging
        Face and vLLM: prompt and output); then, for ``count > 0``,
        ``l -= frequency * count`` and ``l -= presence`` (OpenAI, as in vLLM: output only).

        Args:
            logits: ``[S, V]`` float32, changed in place.
            entry_rows: ``[E]`` int64; an entry whose row is ``>= S`` is padding.
            entry_ids: ``[E]`` int64, each in ``[0, V)``; (row, id) pairs are distinct.
            entry_output_counts: ``[E]`` int32.
            repetition: ``[S]`` float32 > 0, 1 is off.
            presence: ``[S]`` float32, 0 is off.
            frequency: ``[S]`` float32, 0 is off.
        """

    def add_bias(
        self,
        logits: torch.Tensor,
        bias_rows: torch.Tensor,
        bias_ids: torch.Tensor,
        bias_values: torch.Tensor,
    ) -> None:
        """``logits[row, id] += value`` for each entry, in place; ``-inf`` forbids a token.

        Args:
            logits: ``[S, V]`` float32, changed in place.
            bias_rows: ``[E]`` int64; an entry whose row is ``>= S`` is padding.
            bias_ids: ``[E]`` int64, each in ``[0, V)``; (row, id) pairs are distinct.
            bias_values: ``[E]`` float32.
        """

    def apply_token_mask(self, logits: torch.Tensor, mask: torch.Tensor) -> None:
        """Set the logits of forbidden tokens to ``-inf``, in place.

        Token ``i`` of a row is allowed if bit ``i % 32`` of its word ``i // 32`` is 1: the form in
        which grammar libraries give their masks. A row of -1 forbids nothing.

        Args:
            logits: ``[S, V]`` float32, changed in place.
            mask: ``[S, ceil(V/32)]`` int32; bits from ``V`` on are ignored.

        Cost: reads ``S*V/8`` bytes, writes 4 bytes for each forbidden token.
        """

    def sample(
        self,
        out_ids: torch.Tensor,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Draw one token id from each row. The draw depends on (seed, position, logits) only.

        ``temperature == 0``: the id of the largest logit, the lowest such id on a tie; the other
        parameters are ignored. Otherwise, with ``z = (logit - max)/temperature``:

        1. top-k keeps the tokens whose ``z`` is at least the k-th largest (ties are kept);
        2. top-p keeps those of them for which the renormalised probability of all *strictly* more
           likely tokens is below ``top_p`` (so the set does not depend on how ties are sorted);
        3. min-p keeps those whose probability is at least ``min_p`` times the largest.

        This is the order of Hugging Face and of vLLM's first engine (its second one applies min-p
        first). The most likely token always stays. The draw is the Gumbel-max trick: the id with
        the largest ``z - log(E)``, where ``E = -log1p(-u)`` and
        ``u = (token_hash(seed, position, id) + 0.5) / 2^32`` (see ``kernels.noise``), the lowest
        id on a tie. A NaN logit counts as ``-inf``; a row without a logit above ``-inf`` gives 0.

        Args:
            out_ids: ``[S]`` int64.
            logits: ``[S, V]`` float32, read only.
            temperature: ``[S]`` float32 >= 0.
            top_k: ``[S]`` int32; 0 or >= V is off.
            top_p: ``[S]`` float32; >= 1 is off.
            min_p: ``[S]`` float32; 0 is off.
            seeds: ``[S]`` int64.
            positions: ``[S]`` int64.

        Cost: reads ``S*V*4`` bytes once for greedy rows, twice or three times for others.
        """

    def logprobs(
        self,
        out_logprobs: torch.Tensor,
        out_ids: torch.Tensor,
        out_ranks: torch.Tensor,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        k: int,
    ) -> None:
        """Log-softmax of the chosen token and of the ``k`` most likely ones.

        Column 0 is the chosen token; columns ``1..k`` are the top ``k`` in falling order, lower
        ids first on a tie (the chosen token may be there again). The rank of the chosen token is
        1 + the number of tokens with a strictly larger logit.

        Args:
            out_logprobs: ``[S, k+1]`` float32.
            out_ids: ``[S, k+1]`` int64.
            out_ranks: ``[S]`` int64.
            logits: ``[S, V]`` float32, read only, without NaN.
            chosen: ``[S]`` int64, each in ``[0, V)``.
            k: how many top tokens, ``0 <= k <= V``.

        Cost: reads ``S*V*4`` bytes twice.
        """
