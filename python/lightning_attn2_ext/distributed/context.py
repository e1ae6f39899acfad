"""Context parallelism: one sequence, its tokens on many ranks.

LASP-2 (arXiv 2502.07563) with decay. With n the tokens of a rank, S its state from its own tokens alone and P the state
that comes in, P of rank r is the sum over i < r of lambda^(n_{i+1} + ... + n_{r-1}) S_i: ranks need of each other one
state each. So, on every rank:

    forward     S from k, v (edge_state); all_gather S; P; the operator with initial state P
    backward    R = scale sum over i of lambda^(i+1) q_i do_i^T from q, do (edge_state); all_gather R; the gradient
                D of the outgoing state, likewise from the right; la2::backward with P and D

Why two passes, and not the operator from zero and `scale lambda^(i+1) q_i^T P` added after: the second reads the query
and the output again and writes the output again (7 tensors of the shard's size against 6), rounds a bfloat16 output
twice, and hides none of the exchange, since the state is there only when the output is. A backward in one call of
la2::backward needs D before it starts, for the same reason.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (registers autograd and the fake kernels)
from . import chain as chains
from . import group as groups
from .states import arriving, edge_state

_la2 = torch.ops.la2
_NAME = "lightning_attention_cp"


class Setting(NamedTuple):
    """What of a call is no tensor."""

    scale: float
    layout: str
    world: int
    rank: int
    group_name: str
    return_final_state: bool = False
    whole_final_gradient: bool = False  # every rank is given the whole gradient of the final state, not its share


class _Segment(NamedTuple):
    """One segment's part of a packed or dense call."""

    place: int  # in the chain
    begin: int  # its tokens in the local tensors; a slice here would fix their number when torch.compile traces it
    size: int
    low: int  # sequences [low, high) are looked at
    high: int


def _rows(part: _Segment, x: Tensor) -> Tensor:
    return x.narrow(2, part.begin, part.size)


def _segments(setting: Setting, length, chain: chains.Chain, packed: bool) -> list[_Segment]:
    result, begin = [], 0
    places = chains.own_segments(setting.rank, setting.world, setting.layout)
    # Where the host may look at the edges, only the sequences that have tokens here get a state.
    known = packed and chain.edges.device.type == "cpu" and not torch.compiler.is_compiling()
    for place, size in zip(places, chains.segment_lengths(length, setting.layout), strict=True):
        low, high = 0, chain.edges.shape[0] - 1
        if known:
            low, high = int(chain.first[place]), int(chain.last[place]) + 1
            high = max(high, low + 1)
        result.append(_Segment(place, begin, size, low, high))
        begin = begin + size
    return result


def _slope_of(slope: Tensor | None, sequence: Tensor, packed: bool) -> Tensor | None:
    """The slope of one sequence `[1, H]`, where packed sequences have their own."""
    if not packed or slope is None or slope.dim() == 1:
        return slope
    return slope.index_select(0, chains.on(slope, sequence)[None])


def _local_cu(chain: chains.Chain, part: _Segment, like: Tensor, cu_seqlens: Tensor) -> Tensor:
    start, stop = chain.start[part.place], chain.stop[part.place]
    edges = chain.edges[part.low : part.high + 1]
    return chains.on(like, (torch.minimum(torch.maximum(edges, start), stop) - start).to(cu_seqlens.dtype))


def _row(flag: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Rows of `value` `[m, H, D, E]` where `flag` `[m]` (or for all of one number), else those of `other`."""
    return torch.where(chains.on(value, flag).reshape(-1, 1, 1, 1), value, other)


def _sequences(part: _Segment, chain: chains.Chain) -> Tensor:
    return torch.arange(part.low, part.high, device=chain.edges.device)


def _starts_here(chain: chains.Chain, part: _Segment) -> Tensor:
    """`[high - low]` bool: the sequence has tokens, and its first one is in this segment."""
    begin, end = chain.edges[part.low : part.high], chain.edges[part.low + 1 : part.high + 1]
    return (begin >= chain.start[part.place]) & (begin < chain.stop[part.place]) & (end > begin)


def _ends_here(chain: chains.Chain, part: _Segment) -> Tensor:
    """`[high - low]` bool: the sequence has tokens, and its last one is in this segment."""
    begin, end = chain.edges[part.low : part.high], chain.edges[part.low + 1 : part.high + 1]
    return (end > chain.start[part.place]) & (end <= chain.stop[part.place]) & (end > begin)


def _states_in(chain, part, packed, arrived: Tensor, initial_state: Tensor | None) -> Tensor:
    """Initial states of the segment's call: what arrived, and the caller's for sequences that begin here."""
    if not packed:
        return arrived if initial_state is None else _row(chain.from_left[part.place], arrived, initial_state)
    crossing = (_sequences(part, chain) == chain.first[part.place]) & chain.from_left[part.place]
    if initial_state is None:
        own = arrived.new_zeros(part.high - part.low, *arrived.shape[1:])
    else:
        own = _row(_starts_here(chain, part), initial_state[part.low : part.high], arrived.new_zeros(()))
    return _row(crossing, arrived, own)


def _outgoing(k, v, slope, chain, part, packed, initial_state) -> Tensor:
    """The state over the right edge, from tokens of this segment and, where their sequence begins here, its initial
    state: `[B, H, D, E]`."""
    place = part.place
    sequence = chain.last[place]
    span = None
    if packed:
        begin = torch.maximum(chain.last_begin[place], chain.start[place])
        span = torch.stack([begin, chain.stop[place]]) - chain.start[place]
    own = _slope_of(slope, sequence, packed)
    state = edge_state(k, v, own, span, False)
    if initial_state is None:
        return state
    if packed:
        initial_state = initial_state.index_select(0, chains.on(initial_state, sequence)[None])
    steps = chain.stop[place] - chain.last_begin[place]
    begins_here = (chain.last_begin[place] >= chain.start[place]) & (chain.stop[place] > chain.start[place])
    faded = chains.decay(own, steps, state)[..., None, None] * initial_state
    return _row(begins_here, state + faded, state)


def _outgoing_gradient(q, grad_out, slope, chain, part, packed, scale, grad_final_state) -> Tensor:
    """The gradient over the left edge, from tokens of this segment and, where their sequence ends here, from its final
    state."""
    place = part.place
    sequence = chain.first[place]
    end = torch.minimum(chain.first_end[place], chain.stop[place])
    span = torch.stack([torch.zeros_like(end), end - chain.start[place]]) if packed else None
    own = _slope_of(slope, sequence, packed)
    gradient = scale * edge_state(q, grad_out, own, span, True)
    if grad_final_state is None:
        return gradient
    if packed:
        grad_final_state = grad_final_state.index_select(0, chains.on(grad_final_state, sequence)[None])
    ends_here = (chain.first_end[place] <= chain.stop[place]) & (chain.stop[place] > chain.start[place])
    faded = chains.decay(own, end - chain.start[place], gradient)[..., None, None] * grad_final_state
    return _row(ends_here, gradient + faded, gradient)


def _exchange(blocks: list[Tensor], setting: Setting) -> tuple[Tensor, list[int]]:
    """All segments' blocks `[C, B, H, D, E]` and their places in the chain: the one all_gather of a pass."""
    world, layout = setting.world, setting.layout
    places = [place for rank in range(world) for place in chains.own_segments(rank, world, layout)]
    return groups.all_gather(torch.stack(blocks), world, setting.group_name), places


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slope, initial_state, lengths, cu_seqlens, setting):
        setting = Setting(*setting)
        packed = cu_seqlens is not None
        chain, steps, connected = chains.chain_and_steps(lengths, setting.layout, cu_seqlens)
        parts = _segments(setting, q.shape[2], chain, packed)
        blocks = [_outgoing(_rows(p, k), _rows(p, v), slope, chain, p, packed, initial_state) for p in parts]
        gathered, places = _exchange(blocks, setting)
        gathered = groups.wait(gathered, setting.group_name) if setting.world > 1 else gathered
        outs, arrived, final_state = [], [], None
        ends = None
        if setting.return_final_state and packed:
            ends = blocks[0].new_zeros(chain.edges.shape[0] - 1, *blocks[0].shape[1:])
        for part in parts:
            own = _slope_of(slope, chain.first[part.place], packed)
            weights = chains.decay(own, steps[places, part.place], gathered)
            state = arriving(gathered, weights, connected[places, part.place])
            arrived.append(state)
            options = {"scale": setting.scale}
            if packed:
                options["cu_seqlens"] = _local_cu(chain, part, q, cu_seqlens)
            options["initial_state"] = _states_in(chain, part, packed, state, initial_state)
            local = [_rows(part, x) for x in (q, k, v)]
            local_slope = slope[part.low : part.high] if packed and slope is not None and slope.dim() == 2 else slope
            if ends is None:
                outs.append(_la2.forward(*local, local_slope, **options))
            else:
                out, last = _la2.forward_with_state(*local, local_slope, **options)
                outs.append(out)
                mine = _row(_ends_here(chain, part), last, last.new_zeros(()))
                ends = ends + _padded(mine, part, chain)
        if setting.return_final_state:
            final_state = _final_state(chain, slope, gathered, places, ends, initial_state, setting)
        ctx.setting = tuple(setting)
        ctx.save_for_backward(q, k, v, slope, initial_state, lengths, cu_seqlens, *arrived)
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        return out, final_state

    @staticmethod
    def backward(ctx, grad_out, grad_final_state):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{_NAME}: its backward is differentiated again, expected first derivatives only")
        setting = Setting(*ctx.setting)
        q, k, v, slope, initial_state, lengths, cu_seqlens, *arrived = ctx.saved_tensors
        packed = cu_seqlens is not None
        if not setting.return_final_state:
            grad_final_state = None
        else:
            share = grad_final_state
            if not setting.whole_final_gradient:
                grad_final_state = groups.all_reduce(grad_final_state, setting.world, setting.group_name)
            elif setting.rank > 0:
                share = torch.zeros_like(grad_final_state)
        chain, steps, connected = chains.chain_and_steps(lengths, setting.layout, cu_seqlens)
        parts = _segments(setting, q.shape[2], chain, packed)
        blocks = [
            _outgoing_gradient(
                _rows(p, q), _rows(p, grad_out), slope, chain, p, packed, setting.scale, grad_final_state
            )
            for p in parts
        ]
        gathered, places = _exchange(blocks, setting)
        gathered = groups.wait(gathered, setting.group_name) if setting.world > 1 else gathered
        grads = []
        dslope = None if slope is None else torch.zeros_like(slope)
        dinitial_state = None if initial_state is None else torch.zeros_like(initial_state)
        for part, state in zip(parts, arrived, strict=True):
            own = _slope_of(slope, chain.last[part.place], packed)
            weights = chains.decay(own, steps[part.place, places], gathered)
            gradient = arriving(gathered, weights, connected[part.place, places])
            per_sequence = packed and slope is not None and slope.dim() == 2
            local_slope = slope[part.low : part.high] if per_sequence else slope
            dq, dk, dv, ds, dstate = _la2.backward(
                _rows(part, grad_out),
                _gradients_in(chain, part, packed, gradient, grad_final_state),
                *(_rows(part, x) for x in (q, k, v)),
                local_slope,
                initial_state=_states_in(chain, part, packed, state, initial_state),
                cu_seqlens=_local_cu(chain, part, q, cu_seqlens) if packed else None,
                scale=setting.scale,
                need_dslope=ctx.needs_input_grad[3],
            )
            grads.append((dq, dk, dv))
            if slope is not None and ctx.needs_input_grad[3]:
                dslope = dslope + (_padded(ds, part, chain) if per_sequence else ds)
            if initial_state is not None:
                mine = _row(_starts_here(chain, part), dstate, dstate.new_zeros(()))
                dinitial_state = dinitial_state + (_padded(mine, part, chain) if packed else mine)
        if initial_state is not None and setting.return_final_state:
            empty = chain.edges[1:] == chain.edges[:-1]
            dinitial_state = _row(empty, share, dinitial_state)
        dq, dk, dv = grads[0] if len(grads) == 1 else (torch.cat(x, 2) for x in zip(*grads, strict=True))
        needs = ctx.needs_input_grad
        return (
            dq if needs[0] else None,
            dk if needs[1] else None,
            dv if needs[2] else None,
            dslope if needs[3] else None,
            dinitial_state if needs[4] else None,
            None,
            None,
            None,
        )


def passes(
    q, k, v, slope, initial_state, lengths: Tensor, cu_seqlens, setting: Setting
) -> tuple[Tensor, Tensor | None]:
    """Both passes and the exchange, of `[B, H, n, D]` tensors that fit: (out, final state or None)."""
    return _ContextParallel.apply(q, k, v, slope, initial_state, lengths, cu_seqlens, tuple(setting))


def _padded(rows: Tensor, part: _Segment, chain: chains.Chain) -> Tensor:
    """Rows of the sequences that a segment looks at, among all sequences; zero for the others."""
    total = chain.edges.shape[0] - 1
    before, after = part.low, total - part.high
    return torch.cat([rows.new_zeros(before, *rows.shape[1:]), rows, rows.new_zeros(after, *rows.shape[1:])])


def _gradients_in(chain, part, packed, arrived: Tensor, grad_final_state: Tensor | None) -> Tensor:
    """The gradient of the segment's final states: what arrived, and the caller's for sequences that end here."""
    if not packed:
        if grad_final_state is None:
            return arrived
        return _row(chain.to_right[part.place], arrived, _row(_ends_here(chain, part), grad_final_state, arrived))
    crossing = (_sequences(part, chain) == chain.last[part.place]) & chain.to_right[part.place]
    if grad_final_state is None:
        own = arrived.new_zeros(part.high - part.low, *arrived.shape[1:])
    else:
        own = _row(_ends_here(chain, part), grad_final_state[part.low : part.high], arrived.new_zeros(()))
    return _row(crossing, arrived, own)


def _final_state(chain, slope, gathered, places, ends, initial_state, setting) -> Tensor:
    """The same on every rank. Dense: from the states that all ranks have by now. Packed (`ends`: the states of the
    sequences that end here, zero for the others): one all_reduce."""
    if ends is None:
        filled = chain.stop[places] > chain.start[places]
        weights = chains.decay(slope, (chain.edges[1] - chain.stop)[places], gathered)
        final = arriving(gathered, weights, filled)
    else:
        final = groups.all_reduce(ends, setting.world, setting.group_name)
    if initial_state is None:
        return final
    return _row(chain.edges[1:] == chain.edges[:-1], initial_state, final)  # no token: as it came


def lightning_attention_cp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None = None,
    *,
    group=None,
    mesh=None,
    mesh_dim: str | int | None = None,
    layout: str = "contiguous",
    tensor_layout: str = "bhnd",
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    lengths: list[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lightning_attn2_ext.lightning_attention` of sequences whose tokens are spread over the ranks of a group.

    Every rank passes its own tokens and gets their outputs. On the way ranks exchange one state for each head and
    sequence row, whatever the length: `(W - 1) * B * H * D * E * 4` bytes sent by each of W ranks (8 for float64
    inputs; twice as much with ``layout="zigzag"``), and as much again in the backward.

    Args:
        q, k: `[B, H, n, D]`, or `[B, n, H, D]` with ``tensor_layout="bnhd"``, n this rank's tokens: they may differ
            from rank to rank, and may be none. Dtypes and head dims as for `lightning_attention`, the same on all
            ranks. DTensors that are sharded over the tokens (and, as may be, over batch and heads) are taken too,
            without group, mesh and lengths, and give DTensors.
        v: `[B, H, n, E]` (`[B, n, H, E]`).
        slope: `[H]` or `[num_seqs, H]`, the same on all ranks; None is no decay.
        group: the process group whose ranks hold the tokens; None is the default group.
        mesh, mesh_dim: in place of group: a DeviceMesh and the name or index of its dimension.
        layout: "contiguous": rank r holds the r-th piece of the sequence. "zigzag": it holds pieces r and
            2W - 1 - r of 2W, the first `(n + 1) // 2` and the last `n // 2` of its tokens. `split_sequence` cuts
            tensors so, `relayout` turns one into the other.
        tensor_layout: "bhnd" or "bnhd", of q, k, v and the result.
        scale: factor on the scores.
        cu_seqlens: `[num_seqs + 1]`, the boundaries of packed sequences in the whole, unsplit, row of tokens, the
            same on all ranks; B is 1. Sequences may cross ranks at any place. On the CPU it is read by the host, and
            only sequences that have tokens here get a state; on a device it is not, and all of them do.
        initial_state: `[num_seqs, H, D, E]`, the same on all ranks; a rank uses it for the sequences that begin on it.
        return_final_state: also return the final states `[num_seqs, H, D, E]`, the same on all ranks. Packed
            sequences then need an all_reduce of them, and the backward one of their gradients.
        lengths: the token counts of all ranks, where the caller knows them. The ranks then exchange nothing but
            states, and nothing waits for the host. By default they first tell each other what they were called with
            (`8 * len(group.FACTS)` bytes to each other rank), and differences are errors that name the rank.

    Returns:
        out, of v's shape and dtype; with ``return_final_state`` the pair (out, final_state).

    Gradients by slope and initial_state are this rank's share, as those of every parameter are: their sum over the
    group is the gradient. The gradients of a final state that all ranks return are summed over them. All ranks must
    run the backward, since it has a collective too; under activation checkpointing the forward's is repeated. First
    derivatives only, but in a group of one, which is the plain operator.

    Raises:
        RuntimeError: where ranks differ in what must agree, or one has dropped out: the message names the rank. And, as
            in `lightning_attention`, on arguments that do not fit.
        ValueError: on an unknown layout, on group and mesh together, on lengths that do not fit the group or n.
    """
    chains.check_layout(layout, _NAME)
    if tensor_layout not in ("bhnd", "bnhd"):
        raise ValueError(f"{_NAME}: tensor_layout is {tensor_layout!r}, expected 'bhnd' or 'bnhd'")
    if tensor_layout == "bnhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    sharded = _is_dtensor(q)

    def call(q, k, v, slope, initial_state, cu_seqlens, group, lengths):
        options = (layout, scale, cu_seqlens, initial_state, return_final_state, lengths)
        return _on_tensors(q, k, v, slope, group, *options, whole_final_gradient=sharded)

    if sharded:
        if not (group is mesh is mesh_dim is lengths is None) or layout != "contiguous":
            raise ValueError(
                f"{_NAME}: q is a DTensor, expected neither group, mesh, mesh_dim nor lengths, and layout 'contiguous'"
            )
        from .dtensor import call_on_dtensors

        out, final_state = call_on_dtensors(call, _NAME, q, k, v, slope, initial_state, cu_seqlens, return_final_state)
    else:
        group = groups.resolve(group, mesh, mesh_dim, _NAME)
        out, final_state = call(q, k, v, slope, initial_state, cu_seqlens, group, lengths)
    if tensor_layout == "bnhd":
        out = out.transpose(1, 2)
    return (out, final_state) if return_final_state else out


def _is_dtensor(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one who has not imported it
    return module is not None and isinstance(x, module.DTensor)


def _check_arguments(q, k, v, slope, initial_state, cu_seqlens) -> None:
    """The operator's own checks, on no tokens: its errors, before anything else trips over the arguments."""
    if not q.shape[:3] == k.shape[:3] == v.shape[:3]:
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))
        raise RuntimeError(f"{_NAME}: got {shapes}, expected the same batch rows, heads and tokens")
    none = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
    local = [x.detach()[:, :, :0] for x in (q, k, v)]
    with torch.no_grad():
        _la2.forward(*local, slope, initial_state=initial_state, cu_seqlens=none)


def _on_tensors(
    q, k, v, slope, group, layout, scale, cu_seqlens, initial_state, return_final_state, lengths, whole_final_gradient
):
    """The checks, and the call, of [B, H, n, D] tensors that are no DTensors."""
    world, rank, length = group.size(), group.rank(), q.shape[2]
    if cu_seqlens is not None and cu_seqlens.shape[0] < 2:
        raise ValueError(f"{_NAME}: cu_seqlens has {cu_seqlens.shape[0]} entries, expected num_seqs + 1, at least 2")
    compiling = torch.compiler.is_compiling()
    if lengths is None:
        tensors = (q, k, v, slope, initial_state)
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        facts = groups.facts_of(q, v, slope, cu_seqlens, layout, return_final_state, differentiable)
        if world == 1:
            counts = torch.tensor([length])
        elif compiling:
            counts = groups.agree_op(q, facts, group.group_name)
        else:
            counts = torch.tensor(groups.agree(group, facts, q.device))
    else:
        if len(lengths) != world:
            raise ValueError(f"{_NAME}: lengths has {len(lengths)} entries, expected {world}, one for each rank")
        if lengths[rank] != length:
            raise ValueError(f"{_NAME}: lengths[{rank}] is {lengths[rank]}, expected {length}, the tokens of this rank")
        counts = torch.tensor(lengths)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not compiling:
        total, covered = int(counts.sum()), cu_seqlens[[0, -1]].tolist()
        if covered != [0, total]:
            raise ValueError(
                f"{_NAME}: cu_seqlens runs from {covered[0]} to {covered[1]}, expected 0 to {total}, the tokens of all "
                "ranks"
            )
    if not compiling:
        _check_arguments(q, k, v, slope, initial_state, cu_seqlens)
    if world == 1:
        options = {"scale": scale, "cu_seqlens": cu_seqlens, "initial_state": initial_state}
        if return_final_state:
            return _la2.forward_with_state(q, k, v, slope, **options)
        return _la2.forward(q, k, v, slope, **options), None
    setting = Setting(float(scale), layout, world, rank, group.group_name, return_final_state, whole_final_gradient)
    return passes(q, k, v, slope, initial_state, counts, cu_seqlens, setting)
