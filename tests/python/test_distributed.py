"""Context parallelism: many ranks get what one process gets, for exactly one state each."""

import pytest
import torch

from lightning_attn2_ext.distributed import chain
from lightning_attn2_ext.distributed.group import FACTS
from lightning_attn2_ext.distributed.states import edge_state
from tests.support import on_ranks, tolerance
from tests.support.cases import Case
from tests.support.ranks import Ranks

STEEP = [0.0, 50.0, 0.1]
CASES = [
    {"batch": 2, "packed": False, "slope": STEEP, "per_sequence": False, "state": True},
    {"batch": 2, "packed": False, "slope": STEEP, "per_sequence": True, "state": True},
    {"batch": 1, "packed": False, "slope": None, "per_sequence": False, "state": False},
    {"batch": 1, "packed": True, "slope": STEEP, "per_sequence": False, "state": True},
    {"batch": 1, "packed": True, "slope": STEEP, "per_sequence": True, "state": False},
]
LENGTHS = {  # even, uneven with an empty rank in every place, all but one empty
    1: [[40]],
    2: [[40, 40], [0, 37], [70, 0]],
    3: [[30, 30, 30], [0, 64, 5], [33, 0, 21], [7, 70, 0], [0, 9, 0]],
    4: [[20, 20, 20, 20], [5, 0, 66, 17], [0, 0, 12, 1]],
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_float64_is_one_process(ranks, world):
    found = ranks(world).run(on_ranks.worst_error, CASES, LENGTHS[world], chain.LAYOUTS)
    error, where = max(found)
    assert error < 1e-12, where
    assert error > 0 or world == 1, "nothing was compared"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", chain.LAYOUTS)
def test_within_the_bound_of_one_kernel(ranks, dtype, packed, layout):
    lengths = [150, 0, 97, 133]
    shape = {"lengths": (200, 0, 130, 50)} if packed else {"length": sum(lengths)}
    case = Case(heads=3, key_dim=32, value_dim=16, dtype=dtype, slope="mixed", scale=0.125, **shape)
    inputs = case.make()
    whole = [*inputs.args, inputs.initial_state, *inputs.grads]
    options = {"cu_seqlens": inputs.cu_seqlens, "scale": inputs.scale}
    found = ranks(4).run(on_ranks.shards_of, whole, lengths, layout, options)
    rows = [joined([x[i] for x in found], lengths, layout) for i in (0, 2, 3, 4)]
    for other in found[1:]:
        assert torch.equal(found[0][1], other[1]), "final states differ between ranks"
    tolerance.check_forward(inputs, rows[0], found[0][1])
    tolerance.check_backward(inputs, [*rows[1:], *found[0][5:]])


def joined(shards, lengths, layout):
    """Whole tensor from the [B, H, n, ...] of all ranks."""
    out = torch.empty(*shards[0].shape[:2], sum(lengths), shards[0].shape[3], dtype=shards[0].dtype)
    for x, pieces in zip(shards, chain.pieces(lengths, layout), strict=True):
        begin = 0
        for first, end in pieces:
            out[:, :, first:end] = x[:, :, begin : begin + end - first]
            begin += end - first
    return out


def test_bnhd_views_and_a_mesh(ranks):
    assert max(ranks(2).run(on_ranks.in_bnhd)) == 0


@pytest.mark.parametrize("tokens", [1024, 65536])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_on_the_wire(ranks, world, tokens):
    block = 2 * 3 * 8 * 16 * 4  # B H D E, float32
    for forward, backward in ranks(world).run(on_ranks.wire, tokens, torch.float32, "contiguous", True):
        assert forward == backward == {"all_gather_into_tensor": (world - 1) * block}


def test_bytes_of_the_other_ways(ranks):
    block = 2 * 3 * 8 * 16 * 4
    (forward, backward), *_ = ranks(3).run(on_ranks.wire, 300, torch.bfloat16, "zigzag", True)
    assert forward == backward == {"all_gather_into_tensor": 2 * 2 * block}  # two segments a rank
    (forward, backward), *_ = ranks(3).run(on_ranks.wire, 300, torch.bfloat16, "contiguous", False)
    assert forward == {"all_gather_into_tensor": 2 * block, "send": 2 * 8 * len(FACTS)}
    assert backward == {"all_gather_into_tensor": 2 * block}


def test_saves_one_state_whatever_the_length(ranks):
    short, long = (ranks(2).run(on_ranks.saved_bytes, n) for n in (64, 4096))
    assert short == long
    for kept, state in short:
        assert state <= kept <= state + 8 * 2  # and the token counts of the ranks


def test_a_group_of_one_is_the_plain_operator(ranks):
    assert ranks(1).run(on_ranks.in_a_group_of_one) == [True]


def test_nan_does_not_reach_the_ranks_before(ranks):
    assert ranks(3).run(on_ranks.poisoned) == [True, True, False]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(ranks, dynamic):
    ways = {"agreed", "zigzag"} if dynamic else {"lengths", "agreed", "zigzag", "packed", "state"}
    for found in ranks(2).run(on_ranks.compiled, dynamic):
        assert found.keys() == ways
        for error, graphs in found.values():
            # The same operators in the same order but for fused sums of a few numbers: float32 rounding.
            assert error < 16 * torch.finfo(torch.float32).eps and graphs == 1


def test_errors_name_the_argument(ranks):
    (found, *others) = ranks(2).run(on_ranks.errors)
    expected = {
        "layout": "ValueError: lightning_attention_cp: layout is 'spiral', expected",
        "tensor_layout": "ValueError: lightning_attention_cp: tensor_layout is 'nbhd', expected",
        "both": "ValueError: lightning_attention_cp: both group and mesh are given",
        "mesh": "ValueError: lightning_attention_cp: mesh has 2 dimensions ('a', 'b'), expected mesh_dim",
        "mesh_dim": "ValueError: lightning_attention_cp: mesh_dim is 'a' without a mesh",
        "lengths": "ValueError: lightning_attention_cp: lengths has 1 entries, expected 2",
        "own length": "ValueError: lightning_attention_cp: lengths[0] is 7, expected 8",
        "cu_seqlens": "ValueError: lightning_attention_cp: cu_seqlens runs from 0 to 8, expected 0 to 16",
        "no sequence": "ValueError: lightning_attention_cp: cu_seqlens has 1 entries",
        "k": "RuntimeError: lightning_attention_cp: got q [1, 2, 8, 8], k [1, 2, 4, 8]",
        "slope": "RuntimeError: la2::forward: slope",
        "state": "RuntimeError: la2::forward: initial_state",
        "twice": "RuntimeError: lightning_attention_cp: its backward is differentiated again",
        "split": "ValueError: split_sequence: lengths is [1, 1], expected 2 numbers that add up to 8",
        "relayout": "ValueError: relayout: lengths is [1, 1], expected 2 numbers of which that of rank 0 is 8",
    }
    for name, text in expected.items():
        assert found[name].startswith(text), f"{name}: {found[name]}"
    assert found.keys() == expected.keys() == others[0].keys()


@pytest.mark.parametrize("what, told", [("dies", False), ("dies", True), ("sleeps", False), ("sleeps", True)])
def test_a_rank_that_is_missing_is_named(what, told):
    group = Ranks(3, timeout=3)
    try:
        group.start(on_ranks.failing, what, 1, told)
        found = group.results(timeout=25, ranks=(0, 2))
    finally:
        for process in group._processes:
            process.kill()
        group.close()
    for result, trace in found:
        assert trace is None, trace
        message, seconds = result
        assert message.startswith("lightning_attention_cp: rank 1 d"), message  # did not take part, dropped out
        assert "rank 0," not in message and "rank 2," not in message
        assert seconds < 3 + 3 * 1.0 + 5  # the timeout, each look at who is there, and a busy machine


def test_a_rank_that_differs_is_named(ranks):
    for message, _ in ranks(3).run(on_ranks.failing, "differs", 2, False):
        assert message == "lightning_attention_cp: heads is 3 on rank 2, expected 2 as on rank 0"
    assert max(ranks(3).run(on_ranks.poisoned))  # and the group goes on


@pytest.mark.parametrize("lengths", [[8, 8, 8], [5, 0, 9], [1, 1, 1], [0, 0, 3]])
def test_relayout(ranks, lengths):
    for found in ranks(3).run(on_ranks.layouts, lengths):
        assert all(found)


@pytest.mark.parametrize("layout", chain.LAYOUTS)
def test_split_batch(ranks, layout):
    tokens, cu_seqlens = torch.arange(100, 111)[None], torch.tensor([0, 3, 3, 11])
    shards = ranks(3).run(on_ranks.batches, tokens, layout, cu_seqlens)
    lengths = shards[0].lengths
    assert lengths == chain.shard_lengths(11, 3, layout) and sum(lengths) == 11

    def whole(name):
        return joined([getattr(s, name).reshape(1, 1, -1, 1) for s in shards], lengths, layout).flatten().tolist()

    assert whole("inputs") == tokens[0].tolist()
    assert whole("labels") == [101, 102, -100, *range(104, 111), -100]
    assert whole("positions") == [0, 1, 2, *range(8)]


@pytest.mark.parametrize("total, world", [(0, 3), (7, 3), (12, 2), (1023, 8)])
@pytest.mark.parametrize("layout", chain.LAYOUTS)
def test_shard_lengths_and_pieces_cover_everything(total, world, layout):
    lengths = chain.shard_lengths(total, world, layout)
    pieces = chain.pieces(lengths, layout)
    assert max(lengths) - min(lengths) <= (1 if layout == "contiguous" else 2)
    assert sorted(t for own in pieces for a, b in own for t in range(a, b)) == list(range(total))
    assert [sum(b - a for a, b in own) for own in pieces] == lengths
    if layout == "zigzag":
        order = sorted((a, i, j) for i, own in enumerate(pieces) for j, (a, b) in enumerate(own) if b > a)
        assert [i for _, i, _ in order] == [i for i in [*range(world), *reversed(range(world))] if len(order)][
            : len(order)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leftward", [False, True])
@pytest.mark.parametrize("dims", [(8, 16), (128, 64), (64, 256)])
def test_edge_state(monkeypatch, device, dtype, leftward, dims):
    """The state-only pass against its definition, longer than one of its chunks, with and without a span."""
    monkeypatch.setenv("LA2_CHECK", "1")
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("another exp of float64 than the yardstick's")
    draw = torch.Generator().manual_seed(0)
    n, low, high = 5000, 130, 4700
    a = torch.randn(2, 3, n, dims[0], generator=draw, dtype=torch.float64).to(device, dtype)
    b = torch.randn(2, n, 3, dims[1], generator=draw, dtype=torch.float64).to(device, dtype).transpose(1, 2)
    acc = tolerance.accumulation_dtype(dtype)
    slope = torch.tensor([0.0, 50.0, 0.003], dtype=acc, device=device)
    for span in (None, torch.tensor([low, high]), torch.tensor([low, high], device=device)):
        rows = torch.arange(n, device=device)
        lo, hi = (0, n) if span is None else (low, high)
        steps = (rows - lo + 1 if leftward else hi - 1 - rows).clamp(min=0)
        weights = torch.exp(-slope.double()[:, None] * steps) * ((rows >= lo) & (rows < hi))
        want = (a.double() * weights[..., None]).mT @ b.double()
        terms = (a.double().abs() * weights[..., None]).mT @ b.double().abs()
        squares = ((a.double() * weights[..., None]) ** 2).mT @ b.double() ** 2
        got = edge_state(a, b, slope, span, leftward)
        # An operand may be rounded on its way to a matrix unit, as in the kernels; sums are in `acc`.
        bound = tolerance.MARGIN * tolerance.roundoff(dtype) * squares.sqrt() + 2 * tolerance.roundoff(acc) * terms
        if device == "cuda" and dtype == torch.float16:  # weighted values under 2^-24 are multiples of it
            bound = bound + 2**-25 * ((weights > 0).double().expand(3, -1)[..., None].mT @ b.double().abs())
        assert got.dtype == acc
        assert ((got.double() - want).flatten(2).norm(dim=2) <= bound.flatten(2).norm(dim=2)).all()
