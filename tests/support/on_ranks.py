"""What the processes of ranks.py run for tests/python/test_distributed*.py: `function(rank, ...)`, one a process."""

import contextlib
import os
import time

import torch
import torch.distributed as dist

from lightning_attn2_ext import lightning_attention
from lightning_attn2_ext.bench.wire import Wire
from lightning_attn2_ext.distributed import chain, group, lightning_attention_cp, relayout, split_batch, split_sequence

NAMES = ("q", "k", "v", "slope", "initial_state")


def leaves(*tensors):
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def gradients(values, inputs, cotangents):
    """Of those inputs that are not None; the rest are None."""
    given = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(values, given, cotangents))
    return [None if x is None else next(found) for x in inputs]


def one_process(q, k, v, slope, initial_state, grad_out, grad_final_state, **options):
    """(out, final state, five gradients)"""
    own = leaves(q, k, v, slope, initial_state)
    values = lightning_attention(*own[:4], initial_state=own[4], return_final_state=True, **options)
    return [*(x.detach() for x in values), *gradients(values, own, (grad_out, grad_final_state))]


def on_shards(rank, inputs, shards, layout, **options):
    """The same from this rank's part (`shards` tokens on each rank) of the same whole tensors: rows of this rank, and
    gradients by slope and initial state summed over the group."""
    q, k, v, slope, initial_state, grad_out, grad_final_state = inputs
    cut = [split_sequence(x, 2, layout=layout, lengths=shards) for x in (q, k, v, grad_out)]
    own = leaves(*cut[:3], slope, initial_state)
    values = lightning_attention_cp(*own[:4], initial_state=own[4], return_final_state=True, layout=layout, **options)
    # Every rank returns the same final state, and what each does with it adds up.
    share = grad_final_state * (rank + 1) / sum(range(1, dist.get_world_size() + 1))
    found = gradients(values, own, (cut[3], share))
    for x in found[3:]:
        if x is not None:
            dist.all_reduce(x)
    return [*(x.detach() for x in values), *found]


def problem(case, lengths, dtype=torch.float64):
    """Whole tensors of a case {batch, packed, slope, per_sequence, state}, and cu_seqlens."""
    draw = torch.Generator().manual_seed(len(lengths))
    total, heads, d, e = sum(lengths), 3, 16, 24
    cu_seqlens, sequences = None, case["batch"]
    if case["packed"]:
        # Some end where a rank does, some span several ranks, some are empty.
        edges = sorted({lengths[0], total // 3, total - 2} & set(range(1, total)))
        cu_seqlens = torch.tensor([0, 0, *edges, *edges[-1:], total])
        sequences = len(cu_seqlens) - 1

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    rows = [normal(case["batch"], heads, total, dim) for dim in (d, d, e, e)]
    states = [normal(sequences, heads, d, e).to(torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    slope = None
    if case["slope"] is not None:
        slope = torch.tensor(case["slope"], dtype=states[0].dtype)
        if case["per_sequence"]:
            slope = torch.stack([slope.roll(i) * (1 + i) for i in range(sequences)])
    inputs = [*rows[:3], slope, states[0] if case["state"] else None, rows[3], states[1]]
    return inputs, {"cu_seqlens": cu_seqlens, "scale": 0.5}


def worst_error(rank, cases, all_lengths, layouts):
    """For each case the largest error of each result, relative to the largest element of what one process gets."""
    worst = []
    for case in cases:
        for lengths in all_lengths:
            inputs, options = problem(case, lengths)
            want = one_process(*inputs, **options)
            for layout in layouts:
                for told in (lengths, None):
                    got = on_shards(rank, inputs, lengths, layout, lengths=told, **options)
                    errors = []
                    for i, (x, y) in enumerate(zip(got, want, strict=True)):
                        if y is None:
                            continue
                        here = y if i == 1 or i > 4 else split_sequence(y, 2, layout=layout, lengths=lengths)
                        assert x.shape == here.shape and x.dtype == here.dtype
                        if x.numel():
                            errors.append((x - here).abs().max().item() / (y.abs().max().item() or 1.0))
                    worst.append((max(errors), f"{case} {lengths} {layout} lengths={told}"))
    return max(worst)


def shards_of(rank, inputs, lengths, layout, options):
    return on_shards(rank, inputs, lengths, layout, **options)


def shards_on_gpu(rank, inputs, lengths, layout, told, options):
    """shards_of on this rank's GPU, with inputs and results on the CPU."""
    options = {name: x.cuda() if torch.is_tensor(x) else x for name, x in options.items()}
    inputs = [None if x is None else x.cuda() for x in inputs]
    found = on_shards(rank, inputs, lengths, layout, lengths=lengths if told else None, **options)
    return [None if x is None else x.cpu() for x in found]


def in_bnhd(rank):
    """tensor_layout="bnhd", a mesh, and views into a packed projection: the largest difference from "bhnd"."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    qkv = torch.randn(1, 20, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    slope = torch.tensor([0.1, 2.0], dtype=torch.float64)
    a = lightning_attention_cp(*qkv.unbind(2), slope, mesh=mesh, mesh_dim="cp", tensor_layout="bnhd")
    b = lightning_attention_cp(*(x.transpose(1, 2).contiguous() for x in qkv.unbind(2)), slope, mesh=mesh)
    return (a - b.transpose(1, 2)).abs().max().item()


def wire(rank, tokens, dtype, layout, told):
    """Bytes sent by one forward and by its backward, B = 2, H = 3, D = 8, E = 16, on `tokens` tokens in all."""
    lengths = chain.shard_lengths(tokens, dist.get_world_size(), layout)
    q, k, v = (torch.randn(2, 3, lengths[rank], dim, dtype=dtype, requires_grad=True) for dim in (8, 8, 16))
    with Wire() as forward:
        out = lightning_attention_cp(q, k, v, torch.rand(3), layout=layout, lengths=lengths if told else None)
    loss = out.sum()
    with Wire() as backward:
        loss.backward()
    return forward.sent, backward.sent


def saved_bytes(rank, tokens):
    """Bytes that the graph keeps of one call beside q, k, v and slope, and the bytes of one state."""
    q, k, v = (torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3))
    slope = torch.rand(2, requires_grad=True)
    inputs = {x.untyped_storage().data_ptr() for x in (q, k, v, slope)}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in inputs:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lightning_attention_cp(q, k, v, slope)
    return sum(kept.values()), 2 * 16 * 16 * 4


def in_a_group_of_one(rank):
    """Whether it is the plain operator: to the bit, and twice differentiable."""
    q, k, v = torch.randn(3, 1, 2, 8, 8, dtype=torch.float64)
    slope = torch.tensor([0.1, 2.0], dtype=torch.float64)
    (own,) = leaves(q)
    out = lightning_attention_cp(own, k, v, slope)
    (dq,) = torch.autograd.grad(out.square().sum(), own, create_graph=True)
    torch.autograd.grad(dq.sum(), own)
    return torch.equal(out, lightning_attention(q, k, v, slope))


def poisoned(rank):
    """Whether out is finite, where all tokens of the last rank are NaN."""
    x = torch.randn(3, 1, 2, 8, 8)
    if rank == dist.get_world_size() - 1:
        x[:] = torch.nan
    return bool(lightning_attention_cp(*x, torch.rand(2)).isfinite().all())


def compiled(rank, dynamic):
    """{way to call: (largest difference between compiled and eager, forward and backward; graphs)}. With `dynamic` two
    lengths, which must share a graph, and two ways only, for they take long to trace."""
    world, found = dist.get_world_size(), {}
    for name, lengths_of, options in (
        ("lengths", lambda n: [n] * world, {}),
        ("agreed", lambda n: None, {}),
        ("zigzag", lambda n: [n] * world, {"layout": "zigzag"}),
        ("packed", lambda n: None, {"cu_seqlens": torch.tensor([0, 13, 50, 40 * world])}),
        ("state", lambda n: None, {"initial_state": torch.randn(1, 2, 16, 16), "return_final_state": True}),
    ):
        if dynamic and name not in ("agreed", "zigzag"):
            continue
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        worst = 0.0

        def call(q, k, v, slope, lengths_of=lengths_of, options=options):
            result = lightning_attention_cp(q * 2, k, v, slope, lengths=lengths_of(q.shape[2]), **options)
            return result[0] * result[1].sum() if isinstance(result, tuple) else result * 3

        graph = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (40, 56) if dynamic else (40,):
            generator = torch.Generator().manual_seed(rank)
            inputs = [torch.randn(1, 2, n, 16, generator=generator) for _ in range(3)] + [torch.tensor([0.1, 0.5])]
            results = []
            for function in (call, graph):
                own = leaves(*inputs)
                out = function(*own)
                results.append([out.detach(), *torch.autograd.grad(out.square().sum(), own)])
            for x, y in zip(*results, strict=True):
                worst = max(worst, ((x - y).abs().max() / x.abs().max()).item())
        found[name] = worst, torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def errors(rank):
    """The message of each misuse; none of them may leave the ranks out of step."""
    q, k, v = torch.randn(3, 1, 2, 8, 8)
    slope = torch.rand(2)
    world = dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world, 1), mesh_dim_names=("a", "b"))
    told = {"lengths": [8] * world}
    calls = {
        "layout": lambda: lightning_attention_cp(q, k, v, slope, layout="spiral"),
        "tensor_layout": lambda: lightning_attention_cp(q, k, v, slope, tensor_layout="nbhd"),
        "both": lambda: lightning_attention_cp(q, k, v, slope, group=dist.group.WORLD, mesh=mesh),
        "mesh": lambda: lightning_attention_cp(q, k, v, slope, mesh=mesh),
        "mesh_dim": lambda: lightning_attention_cp(q, k, v, slope, mesh_dim="a"),
        "lengths": lambda: lightning_attention_cp(q, k, v, slope, lengths=[8]),
        "own length": lambda: lightning_attention_cp(q, k, v, slope, lengths=[7] * world),
        "cu_seqlens": lambda: lightning_attention_cp(q, k, v, slope, cu_seqlens=torch.tensor([0, 8]), **told),
        "no sequence": lambda: lightning_attention_cp(q, k, v, slope, cu_seqlens=torch.tensor([0]), **told),
        "k": lambda: lightning_attention_cp(q, k[:, :, :4], v, slope, **told),
        "slope": lambda: lightning_attention_cp(q, k, v, torch.rand(3), **told),
        "state": lambda: lightning_attention_cp(q, k, v, slope, initial_state=torch.rand(1, 2, 8, 9), **told),
        "twice": lambda: _twice(q, k, v, slope),
        "split": lambda: split_sequence(q, 2, lengths=[1] * world),
        "relayout": lambda: relayout(q, 2, source="contiguous", target="zigzag", lengths=[1] * world),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "no error"
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _twice(q, k, v, slope):
    q = q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(lightning_attention_cp(q, k, v, slope).sum(), q, create_graph=True)


@contextlib.contextmanager
def short_grace():
    before, group.GRACE = group.GRACE, 1.0
    try:
        yield
    finally:
        group.GRACE = before


def failing(rank, what, bad, told):
    """(message, seconds) of a call in which rank `bad` differs, dies or does not come."""
    if rank == bad and what == "dies":
        os._exit(1)
    if rank == bad and what == "sleeps":
        time.sleep(30)
    heads = 3 if rank == bad and what == "differs" else 2
    q, k, v = torch.randn(3, 1, heads, 8, 8)
    lengths = [8] * dist.get_world_size() if told else None
    begin = time.perf_counter()
    try:
        with short_grace():
            lightning_attention_cp(q, k, v, torch.rand(heads), lengths=lengths)
    except RuntimeError as error:
        return str(error), time.perf_counter() - begin
    return "no error", time.perf_counter() - begin


def layouts(rank, lengths):
    """relayout against split_sequence, forth, back and backward; then split_batch."""
    x = torch.randn(2, 3, sum(lengths), 4, generator=torch.Generator().manual_seed(0))
    here = split_sequence(x, 2, lengths=lengths).clone().requires_grad_()
    there = split_sequence(x, 2, lengths=lengths, layout="zigzag")
    turned = relayout(here, 2, source="contiguous", target="zigzag", lengths=lengths)
    back = relayout(turned, 2, source="zigzag", target="contiguous", lengths=lengths)
    (gradient,) = torch.autograd.grad(turned, here, there)
    return [torch.equal(turned, there), torch.equal(back, here), torch.equal(gradient, here)]


def batches(rank, tokens, layout, cu_seqlens):
    return split_batch(tokens, layout=layout, cu_seqlens=cu_seqlens)
