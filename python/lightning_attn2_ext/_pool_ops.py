"""How torch sees the operators on pools (decode, decode_gated_norm, verify, commit, extend): fake kernels, vmap, no
gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _load  # noqa: F401 - defines the operators
from ._vmap import into_heads, out_of_heads, refuse_mapped, register_vmap, slope_into_heads

_la2 = torch.ops.la2
_library = torch.library.Library("la2", "IMPL")


# ---- fake kernels: shapes and dtypes of the results


@torch.library.register_fake("la2::decode")
def _decode_fake(q, k, v, state, slope=None, *, state_indices=None, scale=1.0, silu=0):
    return q.new_empty((q.shape[0], q.shape[1], v.shape[-1]))


@torch.library.register_fake("la2::decode_gated_norm")
def _decode_gated_norm_fake(q, k, v, state, gate, weight, slope=None, **options):
    return q.new_empty((q.shape[0], q.shape[1] * v.shape[-1]))


@torch.library.register_fake("la2::verify")
def _verify_fake(q, k, v, state, slope=None, *, state_indices=None, scale=1.0):
    return q.new_empty((*q.shape[:3], v.shape[-1]))


@torch.library.register_fake("la2::commit")
def _commit_fake(k, v, state, num_accepted, slope=None, *, state_indices=None):
    return None


@torch.library.register_fake("la2::extend")
def _extend_fake(q, k, v, state, cu_seqlens, slope=None, **options):
    return q.new_empty((q.shape[0], q.shape[1], v.shape[-1]))


# ---- no gradient, and the state changes in place, of which autograd is told below (csrc/ops/stable.h: bump_version).
# They run once a layer and token, so there is one short kernel here, and none in inference mode.


def _refuse_gradients(op, args, writes_state: bool) -> None:
    """Some argument requires grad: an error, but for no_grad where the state is not among them."""
    name = op._opname
    named = dict(zip((a.name for a in op._schema.arguments), args, strict=False))
    if writes_state and named["state"].requires_grad:
        raise RuntimeError(
            f"la2::{name}: state requires grad, expected a state without gradient, since it is updated in place "
            "(pass state.detach(), or use la2::forward_with_state to differentiate)"
        )
    if torch.is_grad_enabled():
        first = next(n for n, x in named.items() if x is not None and x.requires_grad)
        raise RuntimeError(
            f"la2::{name}: {first} requires grad, expected inputs without gradient, since {name} has no "
            "backward (call it under torch.no_grad() or torch.inference_mode(), or use la2::forward_with_state)"
        )


def _register_pool_operator(op) -> None:
    redispatch, below = op._handle.redispatch_boxed, torch._C._after_autograd_keyset
    state = next(a for a in op._schema.arguments if a.name == "state")

    def autograd(keyset, *args, **kwargs):
        for x in args:  # those that are not keyword-only come by position
            if x is not None and x.requires_grad:
                _refuse_gradients(op, args, state.alias_info is not None)
                break
        return redispatch(keyset & below, *args, **kwargs)

    _library.impl(op, autograd, "Autograd", with_keyset=True)


for _name in ("decode", "decode_gated_norm", "verify", "commit", "extend"):
    _register_pool_operator(getattr(_la2, _name).default)


# ---- vmap


def _state_into_heads(op: str, state: Tensor, mapped: int | None, size: int) -> Tensor:
    if mapped is None:
        raise NotImplementedError(f"la2::{op}: state is not mapped by vmap, expected one state for every sample")
    return into_heads(state, mapped, size, 1)


def _out_of_merged(merged: Tensor, state: Tensor, mapped: int, size: int) -> None:
    if merged.data_ptr() != state.data_ptr():  # merging copied, so the update goes back
        state.copy_(out_of_heads(merged, size).movedim(1, mapped))


def _decode_vmap(size, dims, q, k, v, state, slope, state_indices, scale, silu):
    refuse_mapped("decode", "state_indices", dims["state_indices"])
    merged = _state_into_heads("decode", state, dims["state"], size)
    out = _la2.decode(
        into_heads(q, dims["q"], size, 1),
        into_heads(k, dims["k"], size, 1),
        into_heads(v, dims["v"], size, 1),
        merged,
        slope_into_heads(slope, dims["slope"], size),
        state_indices=state_indices,
        scale=scale,
        silu=silu,
    )
    _out_of_merged(merged, state, dims["state"], size)
    return out_of_heads(out, size), 1


def _verify_vmap(size, dims, q, k, v, state, slope, state_indices, scale):
    refuse_mapped("verify", "state_indices", dims["state_indices"])
    out = _la2.verify(
        into_heads(q, dims["q"], size, 2),
        into_heads(k, dims["k"], size, 2),
        into_heads(v, dims["v"], size, 2),
        into_heads(state, dims["state"], size, 1),
        slope_into_heads(slope, dims["slope"], size),
        state_indices=state_indices,
        scale=scale,
    )
    return out_of_heads(out, size, 2), 2


def _commit_vmap(size, dims, k, v, state, num_accepted, slope, state_indices):
    refuse_mapped("commit", "num_accepted", dims["num_accepted"])
    refuse_mapped("commit", "state_indices", dims["state_indices"])
    merged = _state_into_heads("commit", state, dims["state"], size)
    _la2.commit(
        into_heads(k, dims["k"], size, 2),
        into_heads(v, dims["v"], size, 2),
        merged,
        num_accepted,
        slope_into_heads(slope, dims["slope"], size),
        state_indices=state_indices,
    )
    _out_of_merged(merged, state, dims["state"], size)
    return (), ()


_STEP = ("q", "k", "v", "state", "slope", "state_indices", "scale")
_STEP_DEFAULTS = {"slope": None, "state_indices": None, "scale": 1.0}
register_vmap(_la2.decode.default, _decode_vmap, (*_STEP, "silu"), _STEP_DEFAULTS | {"silu": 0})
register_vmap(_la2.verify.default, _verify_vmap, _STEP, _STEP_DEFAULTS)
register_vmap(
    _la2.commit.default,
    _commit_vmap,
    ("k", "v", "state", "num_accepted", "slope", "state_indices"),
    {"slope": None, "state_indices": None},
)


def _decode_gated_norm_vmap(*args, **kwargs):
    raise NotImplementedError(
        "la2::decode_gated_norm: an argument is mapped by vmap, expected none, since a mapped dimension would join the "
        "heads, over all of which the norm is taken (use la2::decode, and the norm by itself)"
    )


_library.impl(_la2.decode_gated_norm.default, _decode_gated_norm_vmap, "FuncTorchBatched")


def _extend_vmap(*args, **kwargs):
    raise NotImplementedError(
        "la2::extend: an argument is mapped by vmap, expected none: requests of unlike lengths are what extend packs"
    )


_library.impl(_la2.extend.default, _extend_vmap, "FuncTorchBatched")
