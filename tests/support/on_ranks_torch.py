"""What the processes of ranks.py run for tests/python/test_distributed_torch.py: DTensor, FSDP2, checkpointing."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_attn2_ext import lightning_attention
from lightning_attn2_ext.bench.wire import Wire
from lightning_attn2_ext.distributed import lightning_attention_cp, split_sequence
from tests.support.on_ranks import leaves


def _problem(world, two):
    """q, k, v, slope, initial state, and cotangents of out and final state; with two, a slope for each batch row."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    batch, heads, n, d, e = world, 2 * world, 5 * world - 1, 16, 8
    slope = normal(*((batch, heads) if two else (heads,))).abs()
    rows = [normal(batch, heads, n, dim) for dim in (d, d, e, e)]
    states = [normal(batch, heads, d, e) for _ in range(2)]
    return [*rows[:3], slope, states[0]], [rows[3], states[1]]


def _whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def _difference(values, want):
    return max(((_whole(x) - y).abs().max() / y.abs().max()).item() for x, y in zip(values, want, strict=True))


def _one_process(inputs, cotangents):
    own = leaves(*inputs)
    values = lightning_attention(*own[:4], initial_state=own[4], return_final_state=True)
    return [x.detach() for x in values] + list(torch.autograd.grad(values, own, cotangents))


def on_batch_and_heads(rank, mesh_shape, placements, two):
    """The operator on DTensors: (largest error, collectives, placements of the results)."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", mesh_shape)
    inputs, cotangents = _problem(world, two)
    want = _one_process(inputs, cotangents)
    as_rows = [{"b": Shard(0), "h": Shard(1), "r": Replicate()}[p] for p in placements]

    def place(x, where):
        return distribute_tensor(x, mesh, where).requires_grad_(x is not cotangents[0] and x is not cotangents[1])

    whole = [Replicate()] * len(placements)
    own = [place(x, where) for x, where in zip(inputs, [as_rows] * 3 + [whole, as_rows], strict=True)]
    back = [place(x, as_rows) for x in cotangents]
    with CommDebugMode() as comm:
        values = torch.ops.la2.forward_with_state(*own[:4], initial_state=own[4])
        found = [*(x.detach() for x in values), *torch.autograd.grad(values, own, back)]
    return (
        _difference(found, want),
        comm.get_total_counts(),
        [tuple(x.placements) for x in found] == _expected(as_rows, two),
    )


def _expected(as_rows, two):
    of_slope = {"r": Replicate(), "b": Shard(0) if two else Partial(), "h": Shard(1 if two else 0)}
    slope = [of_slope["r" if p.is_replicate() else "bh"[p.dim]] for p in as_rows]
    rows = tuple(as_rows)
    return [rows, rows, rows, rows, rows, tuple(slope), rows]


def decoding(rank):
    """decode with the heads of rows and pool sharded: (largest error of out and of the updated pool, collectives)."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4, 2 * world, 8, generator=draw, dtype=torch.float64)
    pool = torch.randn(6, 2 * world, 8, 8, generator=draw, dtype=torch.float64)
    slope, slots = torch.rand(2 * world, generator=draw, dtype=torch.float64), torch.tensor([5, -1, 0, 3])
    after = pool.clone()
    want = torch.ops.la2.decode(q, k, v, after, slope, state_indices=slots)
    rows = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v, pool)]
    slope, slots = distribute_tensor(slope, mesh, [Shard(0)]), distribute_tensor(slots, mesh, [Replicate()])
    with CommDebugMode() as comm:
        out = torch.ops.la2.decode(*rows, slope, state_indices=slots)
        count = comm.get_total_counts()
    return _difference([out, rows[3]], [want, after]), count


def refused(rank):
    """Messages of the operators for shards that they must not gather, and the collectives until then."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    (q, k, v, slope, state), _ = _problem(world, False)

    def place(x, where):
        return distribute_tensor(x, mesh, [where])

    tokens, dims = ([place(x, where) for x in (q, k, v)] for where in (Shard(2), Shard(3)))
    heads = [place(x, Shard(1)) for x in (q, k, v)]
    slope, state = place(slope, Replicate()), place(state, Replicate())
    pool = [x[:, :, 0] for x in heads]
    calls = {
        "forward": lambda: torch.ops.la2.forward(*tokens, slope),
        "bnhd": lambda: lightning_attention(*(x.transpose(1, 2) for x in tokens), slope, layout="bnhd"),
        "backward": lambda: torch.ops.la2.backward(tokens[2], None, *tokens, slope),
        "mixed": lambda: torch.ops.la2.forward(heads[0], tokens[1], heads[2], slope),
        "head dim": lambda: torch.ops.la2.forward(*dims, slope),
        "state": lambda: torch.ops.la2.forward(*heads, slope, initial_state=state),
        "pool": lambda: torch.ops.la2.decode(*pool, state, slope),
        "cp of heads": lambda: lightning_attention_cp(*heads, slope),
        "cp of both": lambda: lightning_attention_cp(tokens[0], heads[1], tokens[2], slope),
        "cp zigzag": lambda: lightning_attention_cp(*tokens, slope, layout="zigzag"),
        "cp group": lambda: lightning_attention_cp(*tokens, slope, mesh=mesh),
    }
    found = {}
    with CommDebugMode() as comm:
        for name, call in calls.items():
            try:
                call()
                found[name] = "no error"
            except (RuntimeError, ValueError) as error:
                found[name] = str(error)
    return found, comm.get_total_counts()


def on_tokens(rank, mesh_shape, placements, two):
    """lightning_attention_cp of DTensors sharded over tokens, and maybe batch or heads: (largest error, bytes sent by
    its all_gathers, those of one state of this rank)."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", mesh_shape)
    inputs, cotangents = _problem(world, two)
    want = _one_process(inputs, cotangents)
    as_rows = [{"b": Shard(0), "h": Shard(1), "n": Shard(2)}[p] for p in placements]
    states = [Replicate() if p.is_shard(2) else p for p in as_rows]
    own = [distribute_tensor(x, mesh, as_rows).requires_grad_() for x in inputs[:3]]
    own += leaves(*inputs[3:])  # plain tensors, the same on all ranks
    back = [distribute_tensor(cotangents[0], mesh, as_rows), distribute_tensor(cotangents[1], mesh, states)]
    with Wire() as sent:
        values = lightning_attention_cp(*own[:4], initial_state=own[4], return_final_state=True)
        found = [*(x.detach() for x in values), *torch.autograd.grad(values, own, back)]
    assert [tuple(x.placements) for x in values] == [tuple(as_rows), tuple(states)]
    return _difference(found, want), set(sent.sent)


class Mixer(nn.Module):
    """A small block whose only way between tokens is the operator."""

    def __init__(self, width, heads, cp):
        super().__init__()
        self.heads, self.cp = heads, cp
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.slope = nn.Parameter(torch.linspace(0.05, 0.5, heads))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        call = lightning_attention_cp if self.cp else lightning_attention
        layout = {"tensor_layout" if self.cp else "layout": "bnhd"}
        return x + self.out(call(F.silu(q), F.silu(k), v, self.slope, **layout).flatten(2))


def model(cp, recompute):
    torch.manual_seed(0)
    blocks = [Mixer(32, 4, cp) for _ in range(2)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            return x.square().mean()

    return Model().double()


def training(rank, sharded, recompute):
    """Two steps of a model whose sequences are split, its parameters sharded by FSDP2 or averaged by hand: (largest
    difference of loss and parameters from one process, all_gathers of states)."""
    world = dist.get_world_size()
    x = torch.randn(2, 12 * world, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, mine = model(False, False), model(True, recompute)
    if sharded:
        for block in mine.blocks:
            fully_shard(block)
        fully_shard(mine)
    here = split_sequence(x, 1)
    worst, states = 0.0, 0
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (whole, mine)]
    for _ in range(2):
        loss = whole(x)
        loss.backward()
        with Wire() as sent:
            own = mine(here)
            own.backward()
        states = sent.sent
        if not sharded:
            for p in mine.parameters():
                dist.all_reduce(p.grad, dist.ReduceOp.SUM)
                p.grad /= world
        mean = own.detach().clone()
        dist.all_reduce(mean)
        worst = max(worst, abs(mean.item() / world - loss.item()) / loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(whole.parameters(), mine.parameters(), strict=True):
            worst = max(worst, ((_whole(b.detach()) - a).abs().max() / a.abs().max()).item())
    return worst, states
