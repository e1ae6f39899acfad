"""DTensor: the operators on shards of the batch and of the heads, and context parallelism for shards of the tokens.

Batch rows and heads do not see each other, so shards of them need no communication: data and tensor parallelism are
the operator on each rank's own part. Tokens do, and the rules here refuse them by name, where DTensor by itself would
gather the whole sequence on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, experimental

_la2 = torch.ops.la2
_ROWS = ("q", "k", "v", "grad_out")
_CP = "lightning_attn2_ext.distributed.lightning_attention_cp"


def _dims_of(spec) -> dict[int, int]:
    """{mesh dimension: tensor dimension} where a spec is sharded."""
    return {i: p.dim for i, p in enumerate(spec.placements) if p.is_shard()}


def _mesh_name(spec, i: int) -> str:
    names = spec.mesh.mesh_dim_names
    return repr(names[i]) if names else str(i)


def _refuse_other_dims(op: str, values: dict, has_tokens: bool) -> None:
    for name in _ROWS:
        spec = values.get(name)
        for i, dim in _dims_of(spec).items() if spec is not None else ():
            if dim >= 2 if has_tokens else dim >= 2 or dim < 0:
                what = "tokens" if has_tokens and dim == 2 else "head dim"
                instead = (
                    f"{_CP}(q, k, v, ...) with the same DTensors" if what == "tokens" else "shards of batch or heads"
                )
                raise RuntimeError(
                    f"la2::{op}: {name} is sharded over its {what}, Shard({dim}) over mesh dimension "
                    f"{_mesh_name(spec, i)}, expected {instead}"
                )


def _refuse_other_state(op: str, name: str, values: dict) -> None:
    """DTensor moves no keyword arguments to where a rule wants them, and what is updated in place must not move."""
    spec = values.get(name)
    if spec is None:
        return
    for other in _ROWS:
        rows = values.get(other)
        if rows is None:
            continue
        here, there = _dims_of(rows), _dims_of(spec)
        if here != there:
            raise RuntimeError(
                f"la2::{op}: {name} has placements {spec.placements} and {other} {rows.placements}, expected both "
                "sharded over batch or heads by the same mesh dimensions"
            )


def _sharding_rule(op, outputs):
    """Registers, for `op`, everything replicated, shards of the batch and shards of the heads.

    `outputs(kind, values)` gives the placements of the results, kind one of "whole", "batch", "heads"."""
    arguments = op._schema.arguments
    name = op._opname

    def rule(*args, **kwargs):
        values = {a.name: a.default_value if a.has_default_value() else None for a in arguments}
        values.update(zip((a.name for a in arguments), args))
        values.update(kwargs)
        state = "state" if name == "decode" else "initial_state"
        _refuse_other_dims(name, values, has_tokens=name != "decode")
        _refuse_other_state(name, state, values)
        packed = values.get("cu_seqlens") is not None
        indexed = values.get("state_indices") is not None
        kinds = ["whole", "heads"] if packed or indexed else ["whole", "batch", "heads"]
        # One entry for each argument that was given, in their order; None for what is no tensor.
        given = [a.name for a in arguments[: len(args)]] + list(kwargs)

        def placement(kind, argument):
            spec = values[argument]
            if not hasattr(spec, "placements"):
                return None
            if kind == "whole" or argument in ("cu_seqlens", "state_indices"):
                return Replicate()
            if argument == "slope":
                own = spec.tensor_meta.shape
                return Shard(len(own) - 1) if kind == "heads" else Shard(0) if len(own) == 2 else Replicate()
            return Shard(0) if kind == "batch" else Shard(1)

        return [(outputs(kind, values), [placement(kind, argument) for argument in given]) for kind in kinds]

    experimental.register_sharding(op)(rule)


def _rows(kind):
    return {"whole": Replicate(), "batch": Shard(0), "heads": Shard(1)}[kind]


def _backward_outputs(kind, values):
    rows, slope = _rows(kind), values.get("slope")
    dslope = Replicate()
    if slope is not None and values.get("need_dslope", True) and kind != "whole":
        two = len(slope.tensor_meta.shape) == 2
        dslope = Shard(int(two)) if kind == "heads" else Shard(0) if two else Partial()
    return [rows, rows, rows, dslope, Replicate() if values.get("initial_state") is None else rows]


def register_sharding_rules() -> None:
    """Rules for `torch.ops.la2.*`; importing `lightning_attn2_ext.distributed` calls this.

    They use an interface that torch calls experimental. A torch without it refuses DTensors in these operators, as in
    any without rules.
    """
    if not hasattr(experimental, "register_sharding"):
        return
    _sharding_rule(_la2.forward.default, lambda kind, _: [_rows(kind)])
    _sharding_rule(_la2.forward_with_state.default, lambda kind, _: [_rows(kind), _rows(kind)])
    _sharding_rule(
        _la2.forward_silu.default,
        lambda kind, values: [_rows(kind), _rows(kind) if values.get("need_state", True) else Replicate()],
    )
    _sharding_rule(_la2.backward.default, _backward_outputs)
    _sharding_rule(_la2.decode.default, lambda kind, _: [_rows(kind)])


def tokens_of_shards(total: int, world: int) -> list[int]:
    """How `Shard` cuts: like torch.chunk, pieces of ceil(total / world) until there is nothing left."""
    size = -(-total // world)
    return [max(0, min(size, total - i * size)) for i in range(world)]


def _local(x: Tensor | None, mesh, placements, grad_placements) -> Tensor | None:
    """This rank's part of x, which may be a plain tensor, the same on all ranks."""
    if x is None:
        return None
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return x.redistribute(mesh, placements).to_local(grad_placements=grad_placements)


def call_on_dtensors(call, caller: str, q, k, v, slope, initial_state, cu_seqlens, return_final_state: bool):
    """`call(q, k, v, slope, initial_state, cu_seqlens, group, lengths)` on local tensors, `[B, H, n, D]` DTensors in
    and out."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, DTensor) or x.device_mesh != q.device_mesh or x.placements != q.placements:
            got = x.placements if isinstance(x, DTensor) else "no DTensor"
            raise RuntimeError(f"{caller}: {name} is {got}, expected {q.placements} on the same mesh, as q is")
    mesh, placements = q.device_mesh, q.placements
    over_tokens = [i for i, p in enumerate(placements) if p.is_shard(2)]
    if len(over_tokens) != 1 or any(type(p) not in (Shard, Replicate) for p in placements):
        raise RuntimeError(f"{caller}: q has placements {placements}, expected one Shard of its tokens (dimension 2)")
    if any(p.is_shard() and p.dim > 2 for p in placements):
        raise RuntimeError(f"{caller}: q has placements {placements}, expected no shards of the head dim")
    (i,) = over_tokens

    def as_rows(of_batch, of_heads, of_tokens):
        chosen = {0: of_batch, 1: of_heads, 2: of_tokens}
        return [chosen[p.dim] if p.is_shard() else Replicate() for p in placements]

    two = slope is not None and slope.dim() == 2
    slope_in = as_rows(Shard(0) if two else Replicate(), Shard(1 if two else 0), Replicate())
    slope_back = as_rows(Shard(0) if two else Partial(), Shard(1 if two else 0), Partial())
    states, states_back = as_rows(Shard(0), Shard(1), Replicate()), as_rows(Shard(0), Shard(1), Partial())
    if isinstance(cu_seqlens, DTensor):
        cu_seqlens = cu_seqlens.full_tensor()
    out, final_state = call(
        *(x.to_local() for x in (q, k, v)),
        _local(slope, mesh, slope_in, slope_back),
        _local(initial_state, mesh, states, states_back),
        cu_seqlens,
        mesh.get_group(i),
        tokens_of_shards(q.shape[2], mesh.size(i)),
    )
    out = DTensor.from_local(out, mesh, placements, run_check=False, shape=v.shape, stride=_strides(v.shape, out))
    if return_final_state:
        final_state = DTensor.from_local(final_state, mesh, states, run_check=False)
    return out, final_state


def _strides(shape, local: Tensor) -> tuple[int, ...]:
    """Strides of a tensor of `shape` whose dimensions lie in memory in the order of those of `local`."""
    order = sorted(range(len(shape)), key=lambda d: (local.stride(d), -d))
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d] = step
        step *= shape[d]
    return tuple(strides)
