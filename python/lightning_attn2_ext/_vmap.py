"""torch.func.vmap of the operators: the mapped dimension joins the heads, which no sequence layout minds."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _load  # noqa: F401 - defines the operators

_la2 = torch.ops.la2
_library = torch.library.Library("la2", "IMPL")


def into_heads(x: Tensor | None, mapped: int | None, size: int, heads_dim: int) -> Tensor | None:
    """Merge the mapped dimension into dimension `heads_dim` (of the unmapped tensor): [..., size * H, ...]."""
    if x is None:
        return None
    if mapped is None:
        x = x.unsqueeze(heads_dim).expand(*x.shape[:heads_dim], size, *x.shape[heads_dim:])
    else:
        x = x.movedim(mapped, heads_dim)
    return x.flatten(heads_dim, heads_dim + 1)


def out_of_heads(x: Tensor, size: int, heads_dim: int = 1) -> Tensor:
    return x.unflatten(heads_dim, (size, x.shape[heads_dim] // size))


def slope_into_heads(slope: Tensor | None, mapped: int | None, size: int) -> Tensor | None:
    if slope is None:
        return None
    return into_heads(slope, mapped, size, slope.dim() - 1 - (mapped is not None))


def refuse_mapped(op: str, name: str, mapped: int | None) -> None:
    if mapped is not None:
        raise NotImplementedError(f"la2::{op}: {name} is mapped by vmap, expected the same {name} for every sample")


def register_vmap(op, rule, signature: tuple[str, ...], defaults: dict) -> None:
    """torch.library.register_vmap, which refuses keyword-only tensors, for `signature` (positional arguments
    first): `rule(info, dims, **arguments)` gets every argument and every mapped dimension by name."""

    def by_position(*args):
        values = dict(zip(signature, args, strict=True))
        positional = [values.pop(name) for name in signature if name not in keyword_only]
        return op(*positional, **values)

    keyword_only = {argument.name for argument in op._schema.arguments if argument.kwarg_only}

    def positional_rule(info, in_dims, *args):
        dims = dict(zip(signature, in_dims, strict=True))
        return rule(info.batch_size, dims, **dict(zip(signature, args, strict=True)))

    def kernel(keyset, *args, **kwargs):
        from torch._functorch.autograd_function import custom_function_call_vmap_helper
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        values = defaults | dict(zip(signature, args, strict=False)) | kwargs
        result = custom_function_call_vmap_helper(
            retrieve_current_functorch_interpreter(), positional_rule, by_position, *(values[n] for n in signature)
        )
        return result if op._schema.returns else None

    _library.impl(op, kernel, "FuncTorchBatched", with_keyset=True)


def _forward_vmap(op):
    def rule(size, dims, q, k, v, slope, initial_state, cu_seqlens, **numbers):
        refuse_mapped(op._opname, "cu_seqlens", dims["cu_seqlens"])
        result = op(
            into_heads(q, dims["q"], size, 1),
            into_heads(k, dims["k"], size, 1),
            into_heads(v, dims["v"], size, 1),
            slope_into_heads(slope, dims["slope"], size),
            initial_state=into_heads(initial_state, dims["initial_state"], size, 1),
            cu_seqlens=cu_seqlens,
            **numbers,
        )
        if isinstance(result, Tensor):
            return out_of_heads(result, size), 1
        out, state = result
        if state.dim() == 1:  # forward_silu without need_state
            return (out_of_heads(out, size), state), (1, None)
        return (out_of_heads(out, size), out_of_heads(state, size)), (1, 1)

    return rule


def _backward_vmap(
    size, dims, grad_out, grad_final_state, q, k, v, slope, initial_state, cu_seqlens, scale, need_dslope
):
    refuse_mapped("backward", "cu_seqlens", dims["cu_seqlens"])
    dq, dk, dv, dslope, dinitial_state = _la2.backward(
        into_heads(grad_out, dims["grad_out"], size, 1),
        into_heads(grad_final_state, dims["grad_final_state"], size, 1),
        into_heads(q, dims["q"], size, 1),
        into_heads(k, dims["k"], size, 1),
        into_heads(v, dims["v"], size, 1),
        slope_into_heads(slope, dims["slope"], size),
        initial_state=into_heads(initial_state, dims["initial_state"], size, 1),
        cu_seqlens=cu_seqlens,
        scale=scale,
        need_dslope=need_dslope,
    )
    has_dslope = slope is not None and need_dslope
    slope_dim = dslope.dim() - 1 if has_dslope else None
    state_dim = None if initial_state is None else 1
    return (
        out_of_heads(dq, size),
        out_of_heads(dk, size),
        out_of_heads(dv, size),
        out_of_heads(dslope, size, slope_dim) if has_dslope else dslope,
        out_of_heads(dinitial_state, size) if initial_state is not None else dinitial_state,
    ), (1, 1, 1, slope_dim, state_dim)


_INPUTS = ("q", "k", "v", "slope", "initial_state", "cu_seqlens", "scale")
_DEFAULTS = {"slope": None, "initial_state": None, "cu_seqlens": None, "scale": 1.0}
for _op in (_la2.forward.default, _la2.forward_with_state.default):
    register_vmap(_op, _forward_vmap(_op), _INPUTS, _DEFAULTS)
register_vmap(
    _la2.forward_silu.default,
    _forward_vmap(_la2.forward_silu.default),
    (*_INPUTS, "silu", "need_state"),
    _DEFAULTS | {"silu": 7, "need_state": True},
)
register_vmap(
    _la2.backward.default,
    _backward_vmap,
    ("grad_out", "grad_final_state", *_INPUTS, "need_dslope"),
    _DEFAULTS | {"need_dslope": True},
)
