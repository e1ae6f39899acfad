"""How torch sees la2::forward, forward_with_state, forward_silu and backward: fake kernels, autograd of any order in
both directions. vmap is in _vmap.py, the operators on pools of states in _pool_ops.py.

The mathematics is the trilinear identity of triton_ref/README.md: forward is linear in each of q, k, v and the
initial state, so every derivative of every order is a sum of calls of `la2::forward_with_state` and
`la2::backward` with some of the arguments replaced by tangents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import _load  # noqa: F401 - defines the operators

_la2 = torch.ops.la2
_library = torch.library.Library("la2", "IMPL")


# ---- fake kernels: shapes, strides and dtypes of the results


def _empty_rows(like: Tensor, dim: int) -> Tensor:
    """A [B, H, N, dim] result in the memory format of `like` (csrc/ops/arguments.h: empty_rows)."""
    batch, heads, length = like.shape[:3]
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return like.new_empty((batch, heads, length, dim))


def _accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_seqs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((num_seqs, q.shape[1], q.shape[3], v.shape[3]), dtype=_accumulation_dtype(q))


@torch.library.register_fake("la2::forward")
def _forward_fake(q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0):
    return _empty_rows(q, v.shape[-1])


@torch.library.register_fake("la2::forward_with_state")
def _forward_with_state_fake(q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0):
    return _empty_rows(q, v.shape[-1]), _empty_state(q, v, cu_seqlens)


@torch.library.register_fake("la2::forward_silu")
def _forward_silu_fake(q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0, silu=7, need_state=True):
    state = _empty_state(q, v, cu_seqlens) if need_state else q.new_empty((0,), dtype=_accumulation_dtype(q))
    return _empty_rows(q, v.shape[-1]), state


@torch.library.register_fake("la2::_states")
def _states_fake(k, v, slope=None, *, cu_seqlens=None, reverse=False):
    return _empty_state(k, v, cu_seqlens)


@torch.library.register_fake("la2::backward")
def _backward_fake(
    grad_out,
    grad_final_state,
    q,
    k,
    v,
    slope=None,
    *,
    initial_state=None,
    cu_seqlens=None,
    scale=1.0,
    need_dslope=True,
):
    accumulation = _accumulation_dtype(q)
    dslope = q.new_empty(slope.shape if slope is not None and need_dslope else (0,), dtype=accumulation)
    dinitial_state = q.new_empty((0,), dtype=accumulation) if initial_state is None else _empty_state(q, v, cu_seqlens)
    return (
        _empty_rows(q, q.shape[-1]),
        _empty_rows(k, k.shape[-1]),
        _empty_rows(v, v.shape[-1]),
        dslope,
        dinitial_state,
    )


# ---- derivatives


class _Term(NamedTuple):
    """One call of forward_with_state in a sum that makes up a directional derivative: `row_weight` times its
    out plus `state_weight` times its final state (None: that part does not count). `factors` tells by what
    each original argument was multiplied to become this term's; an argument missing there was replaced by a
    tangent."""

    q: Tensor
    k: Tensor
    v: Tensor
    initial_state: Tensor | None
    row_weight: Tensor | float | None
    state_weight: Tensor | float | None
    factors: dict[str, Tensor | float]


def _positions(length: int, batch: int, cu_seqlens: Tensor | None, device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token its index within its sequence and its sequence; of every sequence its last index."""
    token = torch.arange(length, device=device)
    if cu_seqlens is None:
        last = torch.full((batch,), length - 1, device=device)
        sequence = torch.arange(batch, device=device)[:, None].expand(batch, length)
        return token.expand(batch, length), sequence, last
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True).clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    start = cu_seqlens[sequence]
    return (token - start)[None], sequence[None], cu_seqlens[1:] - cu_seqlens[:-1] - 1


def _tangent_terms(q, k, v, slope, initial_state, cu_seqlens, tq, tk, tv, tslope, tinitial_state) -> list[_Term]:
    """The derivative of (out, final state) in the direction (tq, tk, tv, tslope, tinitial_state)."""
    terms = []
    everything = {"q": 1.0, "k": 1.0, "v": 1.0, "initial_state": 1.0}

    def without(*names: str) -> dict:
        return {name: factor for name, factor in everything.items() if name not in names}

    if tq is not None:
        terms.append(_Term(tq, k, v, initial_state, 1.0, None, without("q")))
    if tk is not None or tinitial_state is not None:
        new_k = torch.zeros_like(k) if tk is None else tk
        terms.append(_Term(q, new_k, v, tinitial_state, 1.0, 1.0, without("k", "initial_state")))
    if tv is not None:
        terms.append(_Term(q, k, tv, None, 1.0, 1.0, without("v", "initial_state")))
    if tslope is not None:
        # A pair of tokens at distance n carries lambda^n, whose derivative by s is -n lambda^n; n is the
        # difference of two positions, the initial state being at position -1.
        position, sequence, last = _positions(q.shape[2], q.shape[0], cu_seqlens, q.device)
        position = position.to(tslope.dtype)[:, None, :, None]  # [B, 1, N, 1]
        last = last.to(tslope.dtype)[:, None, None, None]  # [num_seqs, 1, 1, 1]
        if tslope.dim() == 1:
            per_token = tslope[None, :, None, None]
            per_state = per_token
        else:
            per_token = tslope[sequence].transpose(1, 2)[..., None]  # [B, H, N, 1]
            per_state = tslope[:, :, None, None]
        for key_factor, state_factor, row_weight, state_weight in (
            (per_token, per_state, -position, -last),
            (per_token * position, -per_state, 1.0, 1.0),
        ):
            new_state = None if initial_state is None else initial_state * state_factor
            factors = everything | {"k": key_factor, "initial_state": state_factor}
            terms.append(_Term(q, (k * key_factor).to(k.dtype), v, new_state, row_weight, state_weight, factors))
    return terms


def _times(x: Tensor | None, weight: Tensor | float) -> Tensor | None:
    if x is None or (isinstance(weight, float) and weight == 1.0):
        return x
    return (x * weight).to(x.dtype)


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return total
    return part if total is None else total + part


def _jvp(terms: list[_Term], slope, cu_seqlens, scale) -> tuple[Tensor | None, Tensor | None]:
    out = state = None
    for term in terms:
        term_out, term_state = _la2.forward_with_state(
            term.q, term.k, term.v, slope, initial_state=term.initial_state, cu_seqlens=cu_seqlens, scale=scale
        )
        if term.row_weight is not None:
            out = _add(out, _times(term_out, term.row_weight))
        if term.state_weight is not None:
            state = _add(state, _times(term_state, term.state_weight))
    return out, state


_GRADIENTS = ("q", "k", "v", "slope", "initial_state")


def _gradient_of_jvp(
    terms: list[_Term], grad_out, grad_final_state, slope, cu_seqlens, scale, need_dslope: bool
) -> dict[str, Tensor | None]:
    """The gradient, by the original arguments, of <grad_out, out'> + <grad_final_state, state'>, where (out',
    state') is the directional derivative that `terms` make up."""
    total: dict[str, Tensor | None] = dict.fromkeys(_GRADIENTS)
    for term in terms:
        term_grad_out = torch.zeros_like(grad_out) if term.row_weight is None else _times(grad_out, term.row_weight)
        term_grad_state = None if term.state_weight is None else _times(grad_final_state, term.state_weight)
        dq, dk, dv, dslope, dstate = _la2.backward(
            term_grad_out,
            term_grad_state,
            term.q,
            term.k,
            term.v,
            slope,
            initial_state=term.initial_state,
            cu_seqlens=cu_seqlens,
            scale=scale,
            need_dslope=need_dslope,
        )
        if slope is not None and need_dslope:
            total["slope"] = _add(total["slope"], dslope)
        for name, gradient in (("q", dq), ("k", dk), ("v", dv), ("initial_state", dstate)):
            if name in term.factors and (name != "initial_state" or term.initial_state is not None):
                total[name] = _add(total[name], _times(gradient, term.factors[name]))
    return total


def raise_out_of_memory(error: RuntimeError, tensors) -> None:
    """Raises torch's own error where ``error`` is csrc/ops' sentence about an allocation on a GPU: a C++ exception does
    not keep its type across torch's stable ABI. In inference mode, which knows no Autograd key, nobody calls this."""
    if str(error).startswith("la2: out of memory") and any(isinstance(t, Tensor) and t.is_cuda for t in tensors):
        raise torch.OutOfMemoryError(str(error)) from error


def _redispatch(op, keyset, args, kwargs):
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
    except RuntimeError as error:
        raise_out_of_memory(error, args)
        raise


def _primals(tensors):
    """Without this level's tangents, which save_for_forward keeps; those of the levels below stay."""
    with forward_ad._set_fwd_grad_enabled(True):
        return [None if t is None else forward_ad.unpack_dual(t).primal for t in tensors]


class _Node(torch.autograd.Function):
    """An autograd node made inside a kernel of the Autograd dispatch key. functorch has peeled a layer by then, so
    the node belongs on that layer's graph directly; Function.apply would hand it to functorch again. The layers
    below still record: `run` restores the gradient modes that a node's forward switches off."""

    @classmethod
    def record(cls, *args):
        if not torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        from torch._functorch.autograd_function import enable_single_level_autograd_function

        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def run(call, *args, **kwargs):
        if not torch._C._are_functorch_transforms_active():
            return call(*args, **kwargs)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return call(*args, **kwargs)


class _Forward(_Node):
    """la2::forward_with_state (and la2::forward, whose state is dropped unseen)."""

    @staticmethod
    def forward(call, q, k, v, slope, initial_state, cu_seqlens, scale):
        return _Node.run(call, q, k, v, slope, initial_state=initial_state, cu_seqlens=cu_seqlens, scale=scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, q, k, v, slope, initial_state, cu_seqlens, scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, slope, initial_state, cu_seqlens)
        ctx.save_for_forward(q, k, v, slope, initial_state, cu_seqlens)
        ctx.scale = scale
        ctx.has_state = isinstance(output, tuple)
        outputs = output if ctx.has_state else (output,)
        ctx.out_shape, ctx.out_dtype = outputs[0].shape, outputs[0].dtype

    @staticmethod
    def backward(ctx, grad_out, grad_final_state=None):
        q, k, v, slope, initial_state, cu_seqlens = ctx.saved_tensors
        if grad_out is None and grad_final_state is None:
            return (None,) * 8
        if grad_out is None:
            grad_out = torch.zeros(ctx.out_shape, dtype=ctx.out_dtype, device=q.device)
        dq, dk, dv, dslope, dinitial_state = _la2.backward(
            grad_out,
            grad_final_state,
            q,
            k,
            v,
            slope,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            scale=ctx.scale,
            need_dslope=ctx.needs_input_grad[4],
        )
        needs = ctx.needs_input_grad
        return (
            None,
            dq if needs[1] else None,
            dk if needs[2] else None,
            dv if needs[3] else None,
            dslope if needs[4] else None,
            dinitial_state if needs[5] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, _call, tq, tk, tv, tslope, tinitial_state, _cu_seqlens, _scale):
        q, k, v, slope, initial_state, cu_seqlens = _primals(ctx.saved_tensors)
        terms = _Node.run(_tangent_terms, q, k, v, slope, initial_state, cu_seqlens, tq, tk, tv, tslope, tinitial_state)
        out, state = _Node.run(_jvp, terms, slope, cu_seqlens, ctx.scale)
        if out is None:
            out = torch.zeros(ctx.out_shape, dtype=ctx.out_dtype, device=q.device)
        if not ctx.has_state:
            return out
        if state is None:
            state = _empty_state(q, v, cu_seqlens).zero_()
        return out, state


class _Backward(_Node):
    """la2::backward: the gradient of L = <grad_out, out> + <grad_final_state, final state>. Its own vector-Jacobian
    product with cotangents t is the gradient of the derivative of L in the direction t."""

    @staticmethod
    def forward(call, grad_out, grad_final_state, q, k, v, slope, initial_state, cu_seqlens, scale, need_dslope):
        return _Node.run(
            call,
            grad_out,
            grad_final_state,
            q,
            k,
            v,
            slope,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            scale=scale,
            need_dslope=need_dslope,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, grad_out, grad_final_state, q, k, v, slope, initial_state, cu_seqlens, scale, need_dslope = inputs
        ctx.set_materialize_grads(False)
        saved = (grad_out, grad_final_state, q, k, v, slope, initial_state, cu_seqlens)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.scale = scale
        ctx.need_dslope = need_dslope
        ctx.mark_non_differentiable(
            *([output[3]] if slope is None or not need_dslope else []), *([output[4]] if initial_state is None else [])
        )

    @staticmethod
    def backward(ctx, tq, tk, tv, tslope, tinitial_state):
        grad_out, grad_final_state, q, k, v, slope, initial_state, cu_seqlens = ctx.saved_tensors
        if slope is None or not ctx.need_dslope:
            tslope = None
        if initial_state is None:
            tinitial_state = None
        terms = _tangent_terms(q, k, v, slope, initial_state, cu_seqlens, tq, tk, tv, tslope, tinitial_state)
        _, need_grad_out, need_grad_state, *need_inputs = ctx.needs_input_grad[:8]
        d_grad_out = d_grad_state = None
        if need_grad_out or need_grad_state:
            d_grad_out, d_grad_state = _jvp(terms, slope, cu_seqlens, ctx.scale)
        total = dict.fromkeys(_GRADIENTS)
        if any(need_inputs):
            total = _gradient_of_jvp(
                terms, grad_out, grad_final_state, slope, cu_seqlens, ctx.scale, need_dslope=need_inputs[3]
            )
        return (
            None,
            d_grad_out if need_grad_out else None,
            d_grad_state if need_grad_state else None,
            *(total[name] if need else None for name, need in zip(_GRADIENTS, need_inputs, strict=True)),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, _call, t_grad_out, t_grad_state, tq, tk, tv, tslope, tinitial_state, *_):
        grad_out, grad_final_state, q, k, v, slope, initial_state, cu_seqlens = _primals(ctx.saved_tensors)
        # The part through the inputs is a product with the Hessian of L, which is symmetric.
        terms = _Node.run(_tangent_terms, q, k, v, slope, initial_state, cu_seqlens, tq, tk, tv, tslope, tinitial_state)
        need_dslope = slope is not None and ctx.need_dslope
        total = _Node.run(
            _gradient_of_jvp, terms, grad_out, grad_final_state, slope, cu_seqlens, ctx.scale, need_dslope
        )
        if t_grad_out is not None or t_grad_state is not None:
            linear = _Node.run(
                _la2.backward,
                torch.zeros_like(grad_out) if t_grad_out is None else t_grad_out,
                t_grad_state,
                q,
                k,
                v,
                slope,
                initial_state=initial_state,
                cu_seqlens=cu_seqlens,
                scale=ctx.scale,
                need_dslope=ctx.need_dslope,
            )
            total = {name: _add(total[name], part) for name, part in zip(_GRADIENTS, linear, strict=True)}
        inputs = {"q": q, "k": k, "v": v, "slope": slope, "initial_state": initial_state}
        differentiable = {"slope": need_dslope, "initial_state": initial_state is not None}
        return tuple(
            (torch.zeros_like(inputs[name]) if total[name] is None else total[name])
            if differentiable.get(name, True)
            else None
            for name in _GRADIENTS
        )


def _differentiable(*tensors: Tensor | None) -> bool:
    """Whether a call needs its autograd kernel: some input requires grad, or forward-mode AD is under way."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _register_forward(op) -> None:
    def autograd(keyset, q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0):
        def call(*args, **kwargs):
            return _redispatch(op, keyset, args, kwargs)

        if _differentiable(q, k, v, slope, initial_state):
            return _Forward.record(call, q, k, v, slope, initial_state, cu_seqlens, scale)
        return call(q, k, v, slope, initial_state=initial_state, cu_seqlens=cu_seqlens, scale=scale)

    _library.impl(op, autograd, "Autograd", with_keyset=True)


_register_forward(_la2.forward.default)
_register_forward(_la2.forward_with_state.default)


def _forward_silu_autograd(
    keyset, q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0, silu=7, need_state=True
):
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "scale": scale}
    if not _differentiable(q, k, v, slope, initial_state) or not 0 <= silu <= 7:
        options |= {"silu": silu, "need_state": need_state}
        return _redispatch(_la2.forward_silu.default, keyset, (q, k, v, slope), options)
    q, k, v = (F.silu(x) if silu >> i & 1 else x for i, x in enumerate((q, k, v)))
    if need_state:
        return _la2.forward_with_state(q, k, v, slope, **options)
    return _la2.forward(q, k, v, slope, **options), q.new_empty((0,), dtype=_accumulation_dtype(q))


_library.impl(_la2.forward_silu.default, _forward_silu_autograd, "Autograd", with_keyset=True)


def _backward_autograd(
    keyset,
    grad_out,
    grad_final_state,
    q,
    k,
    v,
    slope=None,
    *,
    initial_state=None,
    cu_seqlens=None,
    scale=1.0,
    need_dslope=True,
):
    def call(*args, **kwargs):
        return _redispatch(_la2.backward.default, keyset, args, kwargs)

    if _differentiable(grad_out, grad_final_state, q, k, v, slope, initial_state):
        return _Backward.record(
            call, grad_out, grad_final_state, q, k, v, slope, initial_state, cu_seqlens, scale, need_dslope
        )
    return call(
        grad_out,
        grad_final_state,
        q,
        k,
        v,
        slope,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        scale=scale,
        need_dslope=need_dslope,
    )


_library.impl(_la2.backward.default, _backward_autograd, "Autograd", with_keyset=True)
