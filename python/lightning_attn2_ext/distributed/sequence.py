"""Cutting sequences for a group of ranks, and turning one layout into the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import chain as chains
from . import group as groups


class SplitBatch(NamedTuple):
    """One rank's part of a batch; what ranks need of the whole is in it."""

    inputs: Tensor  # [B, n]
    labels: Tensor  # [B, n] the token behind each, from whichever rank; ignore_index at the end of a sequence
    positions: Tensor  # [n] of each token within its sequence
    lengths: list[int]  # [W] token counts of all ranks


def _cut(x: Tensor, dim: int, pieces: list[tuple[int, int]]) -> Tensor:
    parts = [x.narrow(dim, begin, end - begin) for begin, end in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def split_sequence(
    x: Tensor,
    dim: int = 2,
    *,
    group=None,
    mesh=None,
    mesh_dim: str | int | None = None,
    layout: str = "contiguous",
    lengths: list[int] | None = None,
) -> Tensor:
    """This rank's tokens of `x`, whose dimension `dim` is the whole sequence; a view where the layout allows it.

    Args:
        x: any tensor, the same on all ranks.
        group, mesh, mesh_dim, layout: as for `lightning_attention_cp`.
        lengths: token counts `[W]` of the ranks; by default as even as they can be.

    Raises:
        ValueError: on an unknown layout, or lengths that are not those of x and the group.
    """
    group = groups.resolve(group, mesh, mesh_dim, "split_sequence")
    lengths = _lengths_for(x.shape[dim], group.size(), layout, lengths, "split_sequence")
    return _cut(x, dim, chains.pieces(lengths, layout)[group.rank()])


def _lengths_for(total: int, world: int, layout: str, lengths, caller: str) -> list[int]:
    chains.check_layout(layout, caller)
    if lengths is None:
        return chains.shard_lengths(total, world, layout)
    if len(lengths) != world or sum(lengths) != total:
        raise ValueError(f"{caller}: lengths is {lengths}, expected {world} numbers that add up to {total}")
    return list(lengths)


def split_batch(
    tokens: Tensor,
    *,
    group=None,
    mesh=None,
    mesh_dim: str | int | None = None,
    layout: str = "contiguous",
    lengths: list[int] | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> SplitBatch:
    """This rank's part of a batch for next-token prediction.

    Labels are shifted before the cut, so that the last token of a rank is asked for the first of the rank behind it;
    positions count from the start of the sequence, not of the rank.

    Args:
        tokens: `[B, N]`, whole sequences, the same on all ranks.
        cu_seqlens: `[num_seqs + 1]`: B is 1 and the tokens are packed sequences; none predicts the next one's start.
        ignore_index: the label of a token with nothing behind it, as `torch.nn.functional.cross_entropy` has it.
        group, mesh, mesh_dim, layout, lengths: as for `split_sequence`.

    The mean of a loss is over all tokens, not over those of a rank: where ranks have different numbers of labels, sum
    and divide by the number in all of them.
    """
    group = groups.resolve(group, mesh, mesh_dim, "split_batch")
    lengths = _lengths_for(tokens.shape[1], group.size(), layout, lengths, "split_batch")
    labels = torch.cat([tokens[:, 1:], tokens.new_full((tokens.shape[0], min(tokens.shape[1], 1)), ignore_index)], 1)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if cu_seqlens is not None:
        edges = cu_seqlens.to(tokens.device, torch.int64)
        sequence = torch.searchsorted(edges, positions, right=True) - 1
        labels = torch.where(positions + 1 == edges[sequence + 1], ignore_index, labels)
        positions = positions - edges[sequence]
    own = chains.pieces(lengths, layout)[group.rank()]
    return SplitBatch(_cut(tokens, 1, own), _cut(labels, 1, own), _cut(positions, 0, own), lengths)


def _overlaps(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of tokens that are in both, in their order."""
    runs = [(max(p[0], q[0]), min(p[1], q[1])) for p in a for q in b]
    return sorted(run for run in runs if run[0] < run[1])


def _offset(pieces: list[tuple[int, int]], token: int) -> int:
    """Where a token lies on the rank that holds `pieces`."""
    before = 0
    for begin, end in pieces:
        if begin <= token < end:
            return before + token - begin
        before += end - begin
    raise AssertionError(token)


class _AllToAll(torch.autograd.Function):
    """Rows for each rank one behind the other along dimension 0, in and out."""

    @staticmethod
    def forward(ctx, x, received, sent, group_name):
        ctx.numbers = received, sent, group_name
        out = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group_name)
        return groups.wait(out, group_name)

    @staticmethod
    def backward(ctx, grad):
        received, sent, group_name = ctx.numbers
        return _AllToAll.apply(grad, sent, received, group_name), None, None, None


def relayout(
    x: Tensor,
    dim: int = 2,
    *,
    source: str,
    target: str,
    group=None,
    mesh=None,
    mesh_dim: str | int | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """Tokens from one layout to the other, each rank keeping their number; differentiable, and its own inverse with
    source and target exchanged. One all_to_all, of the tokens that change their rank.

    Args:
        x: this rank's tokens along `dim`.
        source, target: "contiguous" or "zigzag" (`lightning_attention_cp`).
        lengths: token counts `[W]` of the ranks; by default they are all that of this rank.
        group, mesh, mesh_dim: as for `lightning_attention_cp`.

    Raises:
        ValueError: on an unknown layout, or lengths that do not fit the group or x.
    """
    for layout in (source, target):
        chains.check_layout(layout, "relayout")
    group = groups.resolve(group, mesh, mesh_dim, "relayout")
    world, rank = group.size(), group.rank()
    lengths = [x.shape[dim]] * world if lengths is None else list(lengths)
    if len(lengths) != world or lengths[rank] != x.shape[dim]:
        raise ValueError(
            f"relayout: lengths is {lengths}, expected {world} numbers of which that of rank {rank} is {x.shape[dim]}"
        )
    if source == target or world == 1:
        return x  # the two halves of a single rank are neighbours
    before, after = chains.pieces(lengths, source), chains.pieces(lengths, target)
    rows = x.movedim(dim, 0)
    sent = [_overlaps(before[rank], after[other]) for other in range(world)]
    received = [_overlaps(before[other], after[rank]) for other in range(world)]
    order = [run for runs in sent for run in runs]
    starts = [_offset(before[rank], begin) for begin, _ in order]
    rows = torch.cat([rows.narrow(0, s, end - begin) for s, (begin, end) in zip(starts, order)] or [rows[:0]])
    rows = _AllToAll.apply(
        rows,
        [sum(end - begin for begin, end in runs) for runs in received],
        [sum(end - begin for begin, end in runs) for runs in sent],
        group.group_name,
    )
    arrived = [run for runs in received for run in runs]
    chunks = rows.split([end - begin for begin, end in arrived]) if arrived else []
    places = sorted(range(len(arrived)), key=lambda i: _offset(after[rank], arrived[i][0]))
    return torch.cat([chunks[i] for i in places] or [rows[:0]]).movedim(0, dim)
