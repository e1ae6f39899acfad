"""The documented functions over `torch.ops.la2.*`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import (
    _direct,
    _ops,  # noqa: F401  (registers autograd and the fake kernels)
)

__all__ = ["commit", "extend", "lightning_attention", "lightning_attention_decode", "verify"]


def _silu_bits(function: str, activated: str) -> int:
    """As the operators want them."""
    if activated.strip("qkv"):
        raise ValueError(f"{function}: activated is {activated!r}, expected letters of 'qkv'")
    return ("q" in activated) + 2 * ("k" in activated) + 4 * ("v" in activated)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: str = "bhnd",
    activated: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with a per-head exponential decay (Lightning Attention-2, arXiv 2401.04658).

    Per sequence and head, with lambda = exp(-slope)::

        S_t = lambda * S_{t-1} + k_t v_t^T          o_t = scale * q_t^T S_t

    The current token is not decayed. Exact, in time and memory linear in the length, differentiable to any order by
    q, k, v, slope and initial_state, through the final state too.

    Args:
        q, k: `[B, H, N, D]`, or `[B, N, H, D]` with ``layout="bnhd"``; bfloat16, float16, float32 (or float64 on the
            CPU). D is any multiple of 8 up to 256. Strides are free but for the last, which should be 1 (else the
            tensor is copied).
        v: `[B, H, N, E]` (`[B, N, H, E]`), of q's dtype. E is any multiple of 8 up to 256 and need not be D.
        slope: `[H]`, or one for each sequence `[num_seqs, H]`; >= 0, in nats per token; float32 (float64 for float64
            inputs). None means 0: no decay, plain linear attention. `lightning_attn2_ext.slopes` has the formulas of
            the published models.
        scale: factor on the scores; 1 as in the paper, `D ** -0.5` in some models.
        initial_state: S_{-1}, `[num_seqs, H, D, E]`, float32 (float64 for float64 inputs), any strides; None is zero.
        return_final_state: also return S_{N-1}, the true state: no decay after the last token.
        cu_seqlens: int32 or int64 `[num_seqs + 1]`, on q's device: B is 1 and sequence i is tokens
            `cu_seqlens[i]:cu_seqlens[i + 1]`. Empty sequences are legal. Without it num_seqs is B.
        layout: "bhnd" or "bnhd", of q, k, v and the result.
        activated: letters of "qkv": these go through SiLU, x * sigmoid(x), first, inside the operator. It is computed
            in float32 (float64 for float64 inputs) and rounded once to their dtype; `F.silu` before may be one ulp off.

    Returns:
        out, of v's shape and dtype, in q's memory format; with ``return_final_state`` the pair (out, final_state),
        the state as described for initial_state.

    Raises:
        RuntimeError: on arguments that do not fit; the sentence names operator, argument, got and wanted.
        ValueError: on an unknown layout, or other letters in activated.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"lightning_attention: layout is {layout!r}, expected 'bhnd' or 'bnhd'")
    silu = _silu_bits("lightning_attention", activated)
    if layout == "bnhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "scale": scale}
    if silu:
        out, final_state = torch.ops.la2.forward_silu(
            q, k, v, slope, **options, silu=silu, need_state=return_final_state
        )
    elif return_final_state:
        out, final_state = torch.ops.la2.forward_with_state(q, k, v, slope, **options)
    else:
        out, final_state = torch.ops.la2.forward(q, k, v, slope, **options), None
    if layout == "bnhd":
        out = out.transpose(1, 2)
    return (out, final_state) if return_final_state else out


def lightning_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slope: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    scale: float = 1.0,
    activated: str = "",
) -> Tensor:
    """One token for each row, against a pool of states that is updated in place.

    `torch.ops.la2.decode`, but for the time of the host: an eager call on plain tensors that no mode, transform,
    autocast, gradient or profiler of this thread has a part in does not pass torch's dispatcher. LA2_DIRECT=0 in the
    environment has every call pass it.

    Args:
        q, k: `[rows, H, D]`; v: `[rows, H, E]`; dtypes and head dims as for `lightning_attention`.
        state: `[slots, H, D, E]`, float32 or bfloat16 (float64 for float64 inputs), any strides; updated in place,
            and may not require grad. Arithmetic is float32 whichever it is; bfloat16 is rounded once a call.
        slope: `[H]` or `[rows, H]`.
        state_indices: int32 or int64 `[rows]`, the slot of each row, no two alike. A negative one is padding: no
            state is touched and the output row is zero. None: row i uses slot i, and slots must equal rows.
        scale: factor on the scores.
        activated: letters of "qkv" that go through SiLU first, as for `lightning_attention`.

    Returns:
        `[rows, H, E]`, of q's dtype.

    Raises:
        RuntimeError: on arguments that do not fit, or where a gradient is asked for.
        ValueError: on other letters in activated.
    """
    silu = _silu_bits("lightning_attention_decode", activated) if activated else 0
    if _direct.decode is not None and not is_dynamo_compiling():
        out = _direct.decode(q, k, v, state, slope, state_indices, scale, silu)
        if out is not None:
            return out
    return torch.ops.la2.decode(q, k, v, state, slope, state_indices=state_indices, scale=scale, silu=silu)


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slope: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The outputs of T draft tokens for each row, one after the other, with the pool of states left as it is: the
    target model's part of speculative decoding. `commit` then takes in the tokens that were accepted.

    The outputs are those of T decode steps, to the bit where the pool is float32 or float64. A bfloat16 state is read
    once and goes on in float32, where T decode steps would round it T times.

    Args:
        q, k: `[rows, T, H, D]`; v: `[rows, T, H, E]`, T from 1 to 16; dtypes and head dims as for
            `lightning_attention`, any strides but the last.
        state: `[slots, H, D, E]`, float32 or bfloat16 (float64 for float64 inputs), any strides; not written.
        slope: `[H]` or `[rows, H]`.
        state_indices: int32 or int64 `[rows]`, the slot of each row. A negative one is padding: its output rows are
            zero. None: row i uses slot i, and slots must equal rows.
        scale: factor on the scores.

    Returns:
        `[rows, T, H, E]`, of q's dtype.

    Raises:
        RuntimeError: on arguments that do not fit, or where a gradient is asked for.
    """
    return torch.ops.la2.verify(q, k, v, state, slope, state_indices=state_indices, scale=scale)


def commit(
    k: Tensor,
    v: Tensor,
    state: Tensor,
    num_accepted: Tensor,
    slope: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
) -> None:
    """Takes the first `num_accepted[i]` of T tokens of each row i into the pool of states, in place: after `verify`,
    with the same k and v.

    The states are those of as many decode steps, to the bit where the pool is float32 or float64. A bfloat16 state is
    rounded once a call.

    Args:
        k: `[rows, T, H, D]`; v: `[rows, T, H, E]`, as for `verify`.
        state: `[slots, H, D, E]`, float32 or bfloat16 (float64 for float64 inputs), any strides; updated in place,
            and may not require grad.
        num_accepted: int32 or int64 `[rows]`, taken as 0 to T where it is beyond. With 0 a slot keeps every bit.
        slope: `[H]` or `[rows, H]`.
        state_indices: int32 or int64 `[rows]`, the slot of each row, no two alike. A negative one is padding: no
            state is touched. None: row i uses slot i, and slots must equal rows.

    Raises:
        RuntimeError: on arguments that do not fit, or where a gradient is asked for.
    """
    torch.ops.la2.commit(k, v, state, num_accepted, slope, state_indices=state_indices)


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    slope: Tensor | None = None,
    *,
    read_slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    snapshot_offsets: Tensor | None = None,
    snapshot_tokens: Tensor | None = None,
    snapshot_slots: Tensor | None = None,
    scale: float = 1.0,
    activated: str = "",
) -> Tensor:
    """New tokens of many requests, packed, against a pool of states that is updated in place: prefill, chunked
    prefill and decode in one call.

    Request r is tokens `cu_seqlens[r]:cu_seqlens[r + 1]`. It continues from the state in slot `read_slots[r]` and
    leaves its own in slot `write_slots[r]`. Nothing is read on the host: the work is planned from shapes alone, on the
    GPU from the lengths, and a CUDA graph captured with room for more tokens and requests is replayed with other
    lengths and slots.

    Two calls alike give the same bits. Which requests are cut into segments, whose states are gathered apart, depends
    on the lengths of all, and so may the last bits of one; with LA2_PLAN=slice=64,segments=1 in the environment none
    is.

    Args:
        q, k: `[tokens, H, D]`; v: `[tokens, H, E]`; dtypes, head dims and strides as for `lightning_attention`.
        state: `[slots, H, D, E]`, float32 or bfloat16 (float64 for float64 inputs), any strides; updated in place,
            and may not require grad. Arithmetic is float32 whichever it is; bfloat16 is rounded once a call.
        cu_seqlens: int32 or int64 `[R + 1]` on q's device, ascending from 0. Tokens behind the last request are
            nobody's: their output rows are zero. A request of one token costs what a decode step does; one of none
            copies its state from slot to slot.
        slope: `[H]` or `[R, H]`.
        read_slots: int32 or int64 `[R]`. A negative slot is not read: zero is the initial state. None: request r uses
            slot r.
        write_slots: int32 or int64 `[R]`, no two alike and none that another request reads. A negative slot is not
            written. None: read_slots. Where both slots of a request are negative it is padding, and its output rows
            are zero.
        has_initial_state: bool `[R]`. False: the request starts from zero, and its read slot is not looked at.
        snapshot_offsets, snapshot_tokens, snapshot_slots: int32 or int64, `[R + 1]`, `[M]`, `[M]`. For m in
            `snapshot_offsets[r]:snapshot_offsets[r + 1]`, the state of request r behind the first
            `snapshot_tokens[m]` of these tokens (0 to all of them) goes to slot `snapshot_slots[m]`, which nobody else
            reads or writes in this call; a negative one is left out.
        scale: factor on the scores.
        activated: letters of "qkv" that go through SiLU first, as for `lightning_attention`.

    Returns:
        `[tokens, H, E]`, of q's dtype.

    Raises:
        RuntimeError: on arguments that do not fit, or where a gradient is asked for. What stands in device memory is
            checked on the CPU, and on a GPU where the environment has LA2_CHECK=1 (which waits for the GPU).
        ValueError: on other letters in activated.
    """
    return torch.ops.la2.extend(
        q,
        k,
        v,
        state,
        cu_seqlens,
        slope,
        read_slots=read_slots,
        write_slots=write_slots,
        has_initial_state=has_initial_state,
        snapshot_offsets=snapshot_offsets,
        snapshot_tokens=snapshot_tokens,
        snapshot_slots=snapshot_slots,
        scale=scale,
        silu=_silu_bits("extend", activated),
    )
