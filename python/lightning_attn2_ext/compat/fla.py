"""flash-linear-attention's operators with a decay that is fixed per head (``fla.ops``, 0.6.0).

``chunk_simple_gla``, ``fused_chunk_simple_gla``, ``fused_recurrent_simple_gla`` with ``g_gamma``;
``chunk_lightning_attn``, ``fused_recurrent_lightning_attn``; ``chunk_retention``, ``fused_recurrent_retention``. All
are one operator here: ``chunk_``, ``fused_chunk_`` and ``fused_recurrent_`` differ in name only, and all of them have
gradients.

Differences: ``g``, a decay for each token, is refused; states are float32 in between too (there in the input's dtype in
the chunked forward); float32 inputs are not computed in TF32 unless torch's settings allow it; ``cu_seqlens`` is never
read on the host, so it is not checked against the tokens; keyword arguments that fla would drop silently are refused by
name (``chunk_size`` and ``cu_seqlens_cpu``, which only tune, are accepted); works under ``torch.compile``, which fla's
functions are excluded from. As there, the default scale is ``K ** -0.5``.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from ._common import attend, formula, per_head, refuse

__all__ = [
    "chunk_lightning_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_simple_gla",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
]


def _state_v_first(function: str, state_v_first: bool, options: dict) -> bool:
    """Takes fla's older name of the argument out of the options, then refuses what is left of them."""
    if "transpose_state_layout" in options:
        if state_v_first:
            raise ValueError(f"{function}: state_v_first and transpose_state_layout are given, expected one of them")
        warnings.warn("transpose_state_layout is deprecated, use state_v_first", DeprecationWarning, stacklevel=3)
        state_v_first = options.pop("transpose_state_layout")
    _refuse_unknown(function, options)
    return state_v_first


def _refuse_unknown(function: str, options: dict) -> None:
    options.pop("chunk_size", None)
    if "head_first" in options:
        raise TypeError(f"{function}: head_first is given, expected tensors [B, T, H, D] without it, as in fla")
    for name in options:
        raise TypeError(f"{function}: got an unexpected keyword argument {name!r}")


def _run(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    state_v_first: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"{function}: q.shape[0] is {q.shape[0]}, expected 1 with cu_seqlens")
        if initial_state is not None and initial_state.shape[0] != cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"{function}: initial_state.shape[0] is {initial_state.shape[0]}, expected the number of sequences in "
                f"cu_seqlens, {cu_seqlens.shape[0] - 1}"
            )
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    if initial_state is not None and state_v_first:
        initial_state = initial_state.mT
    if reverse:  # the sequences of a packed batch change places as their tokens do
        q, k, v = q.flip(1), k.flip(1), v.flip(1)
        if cu_seqlens is not None:
            cu_seqlens = q.shape[1] - cu_seqlens.flip(0)
            initial_state = None if initial_state is None else initial_state.flip(0)
    out, state = attend(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        slope,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_state=output_final_state,
    )
    out = out.transpose(1, 2)
    if reverse:
        out = out.flip(1)
        if state is not None and cu_seqlens is not None:
            state = state.flip(0)
    if state is not None and state_v_first:
        state = state.mT.contiguous()
    return out, state


def _slope_of(function: str, g: Tensor | None, g_gamma: Tensor | None, q: Tensor) -> Tensor | None:
    refuse(function, g=g)
    return None if g_gamma is None else -per_head(function, "g_gamma", g_gamma, q.shape[2], q)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with the decay ``exp(g_gamma)`` a token and head.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, H, V]``; bfloat16, float16, float32 (float64 on the CPU).
        g: must be None.
        g_gamma: ``[H]``, <= 0, the log of the decay; None: no decay.
        scale: on the scores; None: ``K ** -0.5``.
        initial_state: ``[N, H, K, V]``, with state_v_first ``[N, H, V, K]``; N is B, or the number of packed sequences.
        output_final_state: whether to return the state behind the last token.
        state_v_first: the layout of both states.
        cu_seqlens: int32 or int64 ``[N + 1]``: B is 1 and the sequences are packed along T.
        cu_seqlens_cpu, chunk_size: without effect.

    Returns:
        ``(o [B, T, H, V] of v's dtype, final state in float32 or None)``.

    Raises:
        NotImplementedError: where g is given. ValueError: where shapes contradict each other. TypeError: on other
        names.
        RuntimeError: from the operator.
    """
    name = "chunk_simple_gla"
    state_v_first = _state_v_first(name, state_v_first, kwargs)
    slope = _slope_of(name, g, g_gamma, q)
    return _run(name, q, k, v, slope, scale, initial_state, output_final_state, cu_seqlens, state_v_first)


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` with the arguments that this one has."""
    name = "fused_chunk_simple_gla"
    slope = _slope_of(name, g, g_gamma, q)
    return _run(name, q, k, v, slope, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla`; with reverse the tokens of each sequence are read from the last to the first."""
    name = "fused_recurrent_simple_gla"
    state_v_first = _state_v_first(name, state_v_first, kwargs)
    slope = _slope_of(name, g, g_gamma, q)
    return _run(name, q, k, v, slope, scale, initial_state, output_final_state, cu_seqlens, state_v_first, reverse)


def _paper_slope(q: Tensor, layer_idx: int, num_layers: int) -> Tensor:
    return formula("tnl_paper", q.shape[2], layer_idx, num_layers, q.device)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` with ``g_gamma_h = -(8 h / H)(1 - layer_idx / num_layers)``, h from 0.

    That is the formula of the TransNormerLLM paper, of which no released checkpoint is known (``slopes.tnl_paper``).
    layer_idx counts from 0 and must be below num_layers, which fla does not check.
    """
    _refuse_unknown("chunk_lightning_attn", kwargs)
    slope = _paper_slope(q, layer_idx, num_layers)
    return _run("chunk_lightning_attn", q, k, v, slope, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_lightning_attn`; with reverse the tokens of each sequence are read from the last to the first."""
    name, slope = "fused_recurrent_lightning_attn", _paper_slope(q, layer_idx, num_layers)
    return _run(name, q, k, v, slope, scale, initial_state, output_final_state, cu_seqlens, reverse=reverse)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` with RetNet's decay ``1 - 2 ** (-5 - h)``."""
    _refuse_unknown("chunk_retention", kwargs)
    slope = formula("retnet", q.shape[2], 0, 1, q.device)
    return _run("chunk_retention", q, k, v, slope, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_retention`; with reverse the tokens of each sequence are read from the last to the first."""
    name = "fused_recurrent_retention"
    state_v_first = _state_v_first(name, state_v_first, kwargs)
    slope = formula("retnet", q.shape[2], 0, 1, q.device)
    return _run(name, q, k, v, slope, scale, initial_state, output_final_state, cu_seqlens, state_v_first, reverse)
