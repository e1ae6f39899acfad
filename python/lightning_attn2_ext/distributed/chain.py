"""Which tokens lie where: the chain of segments that the ranks of a group hold, and what decays between them.

A *segment* is a run of neighbouring tokens on one rank; the *chain* is all segments in the order of their tokens.
`contiguous`: rank r holds segment r. `zigzag`: rank r holds segments r and 2W - 1 - r, one behind the other, which
gives every rank the same share of causal softmax work in hybrid models. All of it follows from the token counts of
the ranks, of which none need equal another and any may be zero.

Letters as in triton_ref/README.md; besides, W ranks, C segments in the chain, P of them on each rank, M sequences.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "zigzag")


def check_layout(layout: str, caller: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"{caller}: layout is {layout!r}, expected 'contiguous' or 'zigzag'")


def own_segments(rank: int, world: int, layout: str) -> list[int]:
    """Places in the chain of the segments that `rank` holds, in the order in which it holds them."""
    return [rank] if layout == "contiguous" else [rank, 2 * world - 1 - rank]


def segment_lengths(length, layout: str) -> list:
    """Tokens of each segment of a rank that holds `length`: the first half of a zigzag is the larger one."""
    return [length] if layout == "contiguous" else [(length + 1) // 2, length // 2]


def shard_lengths(total: int, world: int, layout: str = "contiguous") -> list[int]:
    """Token counts `[W]` of the ranks when `total` tokens are spread as evenly as they can be."""
    check_layout(layout, "shard_lengths")
    pieces = world if layout == "contiguous" else 2 * world
    sizes = [total // pieces + (i < total % pieces) for i in range(pieces)]
    return [sum(sizes[i] for i in own_segments(rank, world, layout)) for rank in range(world)]


def pieces(lengths: list[int], layout: str) -> list[list[tuple[int, int]]]:
    """For each rank the [first, behind last) global tokens of each of its segments, in the order in which it holds
    them."""
    world = len(lengths)
    sizes = {}
    for rank, length in enumerate(lengths):
        for place, size in zip(own_segments(rank, world, layout), segment_lengths(length, layout), strict=True):
            sizes[place] = size
    starts, total = {}, 0
    for place in range(len(sizes)):
        starts[place] = total
        total += sizes[place]
    return [
        [(starts[place], starts[place] + sizes[place]) for place in own_segments(rank, world, layout)]
        for rank in range(world)
    ]


class Chain(NamedTuple):
    """Global token positions, int64. The tensors have an entry for each segment, in the order of the chain."""

    start: Tensor  # [C]
    stop: Tensor  # [C]
    edges: Tensor  # [M + 1] where sequences begin, and where the last ends
    first: Tensor  # [C] the sequence of a segment's first token
    last: Tensor  # [C] the sequence of its last token
    first_begin: Tensor  # [C] where the former begins
    first_end: Tensor  # [C] and ends
    last_begin: Tensor  # [C] where the latter begins
    last_end: Tensor  # [C] and ends
    from_left: Tensor  # [C] bool: it begins within a sequence, so a state comes in
    to_right: Tensor  # [C] bool: it ends within a sequence, so a state goes out


def make_chain(lengths: Tensor, layout: str, cu_seqlens: Tensor | None) -> Chain:
    """From `lengths` `[W]`; without `cu_seqlens` (global, `[M + 1]`) every batch row is one sequence."""
    if layout == "zigzag":
        lengths = torch.cat([(lengths + 1) // 2, (lengths // 2).flip(0)])
    stop = lengths.cumsum(0)
    if cu_seqlens is None:
        edges = torch.cat([torch.zeros_like(stop[:1]), stop[-1:]])
    else:
        edges = cu_seqlens.to(stop.dtype)
        stop = stop.to(edges.device)
    start = torch.cat([torch.zeros_like(stop[:1]), stop[:-1]])
    top = edges.shape[0] - 2
    # Of several edges at one place all but the last belong to empty sequences.
    first = (torch.searchsorted(edges, start, right=True) - 1).clamp(0, top)
    last = (torch.searchsorted(edges, stop - 1, right=True) - 1).clamp(0, top)
    first_begin, first_end, last_begin, last_end = edges[first], edges[first + 1], edges[last], edges[last + 1]
    from_left = (start > first_begin) & (stop > start)
    to_right = (stop < last_end) & (stop > start)
    return Chain(start, stop, edges, first, last, first_begin, first_end, last_begin, last_end, from_left, to_right)


def steps_between(chain: Chain) -> tuple[Tensor, Tensor]:
    """`[C, C]`: entry (i, j) of the first is the number of steps from the end of segment i to the start of the later
    segment j, and of the second whether a state that leaves i arrives at j, undivided by a start of a sequence."""
    steps = chain.start[None, :] - chain.stop[:, None]
    order = torch.arange(chain.start.shape[0], device=steps.device)
    connected = (order[:, None] < order[None, :]) & chain.to_right[:, None] & chain.from_left[None, :]
    return steps.clamp(min=0), connected & (chain.stop[:, None] > chain.first_begin[None, :])


@functools.lru_cache(maxsize=4)
def _dense(lengths: tuple[int, ...], layout: str) -> tuple[Chain, Tensor, Tensor]:
    with torch.inference_mode(False):
        chain = make_chain(torch.tensor(lengths), layout, None)
        return chain, *steps_between(chain)


def chain_and_steps(lengths: Tensor, layout: str, cu_seqlens: Tensor | None) -> tuple[Chain, Tensor, Tensor]:
    """`make_chain` and its `steps_between`: some forty small operations on the host, which every layer of a model would
    repeat, so without cu_seqlens they are remembered."""
    if cu_seqlens is None and type(lengths) is Tensor and not torch.compiler.is_compiling():
        return _dense(tuple(lengths.tolist()), layout)
    chain = make_chain(lengths, layout, cu_seqlens)
    return chain, *steps_between(chain)


def on(like: Tensor, x: Tensor) -> Tensor:
    """x, a few numbers, on the device of `like`, without the host waiting for what that device is doing."""
    return x.to(like.device, non_blocking=True)


def decay(slope: Tensor | None, steps: Tensor, like: Tensor) -> Tensor:
    """`exp(-slope * steps)`, `[..., b, H]` for steps `[...]` and slope `[H]` (b = 1) or `[b, H]`.

    On the device and in the dtype of `like`, but taken in float64: float32 cannot count the tokens of a long
    sequence, and what is taken here is small.
    """
    if slope is None:
        return like.new_ones((*steps.shape, 1, 1))
    rates = slope.double() if slope.dim() == 2 else slope.double()[None]
    return torch.exp(-rates * on(like, steps)[..., None, None]).to(like.dtype)
