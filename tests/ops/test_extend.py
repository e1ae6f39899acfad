"""la2::extend against the recurrence in float64, request by request, and against itself in other pieces."""

import pytest
import torch

import lightning_attn2_ext
from tests.support.pools import bits, pool_of
from tests.support.requests import Problem, slots_of
from tests.support.tolerance import check_forward

la2 = torch.ops.la2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = float("nan")
MIXED = (0, 1, 2, 63, 64, 65, 300)
INDEX_DTYPES = (torch.int32, torch.int64)


# ---- against the recurrence


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
@pytest.mark.parametrize("dims", ((40, 24), (128, 64)))
def test_mixed_lengths(device, dtype, pool, dims):
    for index_dtype in INDEX_DTYPES:
        x = Problem(device, MIXED, slots=slots_of(MIXED), dtype=dtype, pool=pool, dims=dims, index_dtype=index_dtype,
                    fresh=(2, 4), per_request=index_dtype == torch.int64, tail=9, slope="usual")  # fmt: skip
        for r in x.fresh:
            x.state[x.slots[r][0]] = NAN
        x.run_and_check()


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("dims", ((8, 136), (256, 128), (136, 256)))
def test_other_dims(device, dtype, dims):
    for pool in ("kv", "vk"):
        lengths = (130, 0, 1, 70)
        Problem(device, lengths, slots=slots_of(lengths), dims=dims, dtype=dtype, pool=pool, tail=3).run_and_check()


@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
def test_float64(device, pool):
    lengths = (0, 1, 33, 130)
    snapshots = [[(0, 20)], [(1, 21)], [(1, 22), (32, 23)], []]
    Problem(device, lengths, slots=slots_of(lengths), dtype=FP64, pool=pool, snapshots=snapshots).run_and_check()


def test_in_place_without_slots(device):
    Problem(device, MIXED, tail=5).run_and_check()
    Problem(device, MIXED, slots=slots_of(MIXED, apart=False), dtype=BF16).run_and_check()


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
def test_bfloat16_pools_round_once(device, dtype, pool):
    """Of the same values in float32: the same outputs, and the states of that pool, rounded."""
    snapshots = [[(0, 30)], [(1, 31)], [], [(60, 32)], [(64, 33)], [], [(1, 34), (128, 35), (299, 36)]]
    for dims in ((40, 24), (128, 128), (256, 64)):
        x = Problem(device, MIXED, slots=slots_of(MIXED), dtype=dtype, pool=pool, pool_dtype=BF16, dims=dims,
                    snapshots=snapshots, fresh=(3,))  # fmt: skip
        before = x.state.clone()
        wide = pool_of(x.state.shape, pool, FP32, device).copy_(x.state)
        out_wide = x.run(wide)
        x.check(out_wide, before.float(), wide)
        out = x.run()
        assert torch.equal(out, out_wide)
        assert torch.equal(x.state, wide.to(BF16))


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_snapshots(device, dtype, index_dtype):
    """None, aligned, unaligned and all tokens; several of one request; one that is left out; of short requests too."""
    lengths = (300, 0, 1, 64, 65, 2)
    snapshots = [[(0, 20), (1, 21), (64, 22), (100, -1), (192, 23), (300, 24)], [(0, 25)], [(0, 26), (1, 27)],
                 [(64, 28)], [], [(1, 29)]]  # fmt: skip
    for pool in ("kv", "vk"):
        for fresh in ((), (0, 2)):
            x = Problem(device, lengths, slots=slots_of(lengths), snapshots=snapshots, dtype=dtype, pool=pool, tail=2,
                        index_dtype=index_dtype, fresh=fresh, per_request=True, slope="usual")  # fmt: skip
            for r in fresh:
                x.state[x.slots[r][0]] = NAN
            x.run_and_check()


def test_snapshots_change_nothing_else(device):
    lengths = (300, 1, 65)
    with_them = Problem(device, lengths, snapshots=[[(64, 10), (299, 11)], [(1, 12)], []], num_slots=13)
    without = Problem(device, lengths, num_slots=13)
    assert torch.equal(with_them.run(), without.run())
    assert torch.equal(with_them.state[:10], without.state[:10])


def test_snapshot_of_everything_is_the_final_state(device):
    x = Problem(device, (300, 1, 0), slots=[(0, 1), (2, 3), (4, 5)], snapshots=[[(300, 6)], [(1, 7)], [(0, 8)]])
    before = x.state.clone()
    x.check(x.run(), before, x.state)
    assert torch.equal(x.state[5], before[4]) and torch.equal(x.state[8], before[4])


# ---- slots


def test_padding(device):
    """Either slot may be absent: without both the rows are zero, too."""
    lengths = (70, 1, 0, 64, 1, 130, 1, 0, 200)
    slots = [(-1, -1), (-1, -1), (-1, -1), (3, -1), (4, -1), (-1, 5), (-2, 6), (-1, 7), (-9, -9)]
    for dtype in (FP32, BF16):
        x = Problem(device, lengths, slots=slots, dtype=dtype, tail=4)
        x.run_and_check()
        assert not x.state[7].any()


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_padding_everywhere(device, dtype):
    lengths = (3, 0, 1, 100)
    x = Problem(device, lengths, slots=[(-1, -1)] * 4, snapshots=[[(1, -1)], [], [], [(64, -1)]], dtype=dtype, tail=8,
                num_slots=3)  # fmt: skip
    before = x.state.clone()
    assert not x.run().any()
    assert torch.equal(x.state, before)


def test_no_request_has_a_token(device):
    """States move where the slots differ, or become zero without an initial state; every row is zero."""
    slots = [(0, 0), (1, 4), (2, 5), (-1, 6), (3, 3)]
    for pool_dtype in (FP32, BF16):
        x = Problem(device, (0,) * 5, slots=slots, fresh=(2, 4), tail=7, pool_dtype=pool_dtype)
        x.state[2] = NAN
        x.state[3] = NAN
        before = x.state.clone()
        assert not x.run().any()
        assert torch.equal(x.state[4], before[1])
        assert not x.state[[3, 5, 6]].any()
        assert torch.equal(bits(x.state[:3]), bits(before[:3])) and torch.equal(x.state[7:], before[7:])


def test_nothing_at_all(device):
    for lengths, tail in (((), 0), ((), 5), ((0, 0), 0)):
        x = Problem(device, lengths, tail=tail, num_slots=2)
        before = x.state.clone()
        assert not x.run().any()
        assert torch.equal(x.state, before)


def test_one_slot_is_read_by_many(device):
    """As where requests share a prefix."""
    Problem(device, (70, 1, 0, 130), slots=[(4, 0), (4, 1), (4, 2), (4, 3)], dtype=BF16).run_and_check()


# ---- strides


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_views_into_a_packed_projection(device, dtype):
    x = Problem(device, MIXED, slots=slots_of(MIXED), dtype=dtype, dims=(64, 64), tail=3)
    packed = torch.cat((x.q, x.k, x.v), -1)  # [tokens, H, 3 D]
    x.q, x.k, x.v = packed.split(64, -1)
    assert not x.q.is_contiguous()
    x.run_and_check()
    heads_first = torch.cat((x.q, x.k, x.v), 1)  # [tokens, 3 H, D]
    x.q, x.k, x.v = heads_first.split(2, 1)
    x.run_and_check()


# ---- in pieces


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("pool", ("kv", "vk"))
def test_any_split_gives_the_same(device, dtype, pool):
    """Extends and decode steps of unlike sizes, and the whole at once by forward, all held to one tolerance."""
    lengths = (300, 201)
    whole = Problem(device, lengths, dtype=dtype, pool=pool, dims=(64, 64), slope="usual")
    before = whole.state.clone()
    x = whole.sequences(before, list(enumerate(lengths)))
    check_forward(x, *la2.forward_with_state(*x.args, **x.options))
    for cuts in ((64, 65, 66, 130, 131, 200), (1, 2, 3, 128), (100,), (0, 63, 127, 191)):
        state, outs = before.clone(), [[], []]
        state = pool_of(before.shape, pool, before.dtype, device).copy_(before)
        edges = [0, *cuts, max(lengths)]
        for lo, hi in zip(edges, edges[1:], strict=False):
            spans = [(whole.ends[r] + min(lo, n), whole.ends[r] + min(hi, n)) for r, n in enumerate(lengths)]
            counts = [b - a for a, b in spans]
            rows = torch.cat([torch.arange(a, b, device=device) for a, b in spans])
            q, k, v = whole.q[rows], whole.k[rows], whole.v[rows]
            if counts == [1, 1] and lo % 2:
                out = la2.decode(q, k, v, state, whole.slope, scale=0.5, state_indices=whole.index([0, 1]))
            else:
                ends = whole.index([0, counts[0], sum(counts)])
                out = la2.extend(q, k, v, state, ends, whole.slope, scale=0.5)
            outs[0].append(out[: counts[0]])
            outs[1].append(out[counts[0] :])
        out = torch.cat(outs[0] + outs[1]).transpose(0, 1)[None]
        check_forward(x, out, state[:2])
        assert torch.equal(state[2:], before[2:])


def test_twice_the_same(device):
    for dtype in (FP32, BF16):
        one, two = (Problem(device, MIXED, slots=slots_of(MIXED), dtype=dtype) for _ in range(2))
        assert torch.equal(one.run(), two.run())
        assert torch.equal(one.state, two.state)


# ---- torch


@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
@pytest.mark.parametrize("kind", ("plain", "slots", "snapshots"))
def test_opcheck(device, pool_dtype, kind):
    lengths = (3, 0, 1, 20)
    slots = None if kind == "plain" else [(0, 4), (1, 1), (-1, -1), (3, 5)]
    snapshots = [[(1, 6)], [], [], [(16, 7), (20, 8)]] if kind == "snapshots" else None
    x = Problem(device, lengths, slots=slots, snapshots=snapshots, fresh=(3,), pool_dtype=pool_dtype, pool="vk")
    arguments = (x.q, x.k, x.v, x.state, x.index(x.ends), x.slope)
    torch.library.opcheck(la2.extend.default, arguments, x.options)


def test_compiles_whole(device):
    x = Problem(device, MIXED, slots=slots_of(MIXED))
    twin = x.state.clone()

    def step(q, k, v, state, ends, options):
        return la2.extend(q * 2, k, v, state, ends, **options) + state[0, 0, 0, 0]

    ends, options = x.index(x.ends), x.options
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x.q, x.k, x.v, x.state, ends, options)
    assert torch.equal(got, step(x.q, x.k, x.v, twin, ends, options))
    assert torch.equal(x.state, twin)


def test_the_function_is_the_operator(device):
    x, y = (Problem(device, MIXED, slots=slots_of(MIXED), snapshots=[[]] * 6 + [[(64, 40)]]) for _ in range(2))
    out = lightning_attn2_ext.extend(x.q, x.k, x.v, x.state, x.index(x.ends), x.slope, **x.options)
    assert torch.equal(out, y.run()) and torch.equal(x.state, y.state)


@pytest.mark.parametrize("name", ("q", "k", "v", "slope", "state"))
def test_refuses_to_differentiate(device, name):
    x = Problem(device, (3, 2))
    getattr(x, name).requires_grad_()
    with pytest.raises(RuntimeError, match=f"la2::extend: {name} requires grad"):
        x.run()
    if name != "state":
        with torch.no_grad():
            x.run()


def test_says_that_it_changed_its_state(device):
    x = Problem(device, (3, 2))
    version = x.state._version
    x.run()
    assert x.state._version == version + 1


def test_refuses_vmap(device):
    x = Problem(device, (3, 2))
    with pytest.raises(NotImplementedError, match="la2::extend: an argument is mapped by vmap"):
        torch.vmap(lambda q: la2.extend(q, x.k, x.v, x.state, x.index(x.ends)))(torch.stack((x.q, x.q)))


def test_autocast(device):
    x, y = (Problem(device, MIXED, slots=slots_of(MIXED)) for _ in range(2))
    with torch.autocast(device, BF16):
        out = x.run()
    y.q, y.k, y.v = (t.to(BF16) for t in (y.q, y.k, y.v))
    assert out.dtype == BF16 and torch.equal(out, y.run()) and torch.equal(x.state, y.state)


# ---- what is refused

REFUSED = {  # argument, what it becomes, words of the sentence
    "q": (lambda x: x.q[0], ("q", "3 dimensions")),
    "k": (lambda x: x.k[:-1], ("k.shape", "as for q")),
    "state": (lambda x: x.state[0], ("state", "slots")),
    "state dtype": (lambda x: x.state.half(), ("state.dtype", "float16", "float32 or bfloat16")),
    "cu_seqlens": (lambda x: x.index(x.ends)[None], ("cu_seqlens", "number of requests")),
    "cu_seqlens dtype": (lambda x: torch.tensor(x.ends, device=x.device).double(), ("cu_seqlens.dtype", "int32")),
    "slope": (lambda x: x.slope[:1], ("slope", "expected")),
    "read_slots": (lambda x: x.index([0]), ("read_slots", "one for each request")),
    "write_slots": (lambda x: x.index([0, 1]).double(), ("write_slots.dtype", "int32")),
    "has_initial_state": (lambda x: x.index([0, 1, 1]), ("has_initial_state.dtype", "bool|Bool")),
    "snapshot_slots": (lambda x: x.index([4]), ("snapshot_offsets is None", "together")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(device, name):
    x = Problem(device, (3, 2, 5))
    change, words = REFUSED[name]
    named = {"q": x.q, "k": x.k, "v": x.v, "state": x.state, "cu_seqlens": x.index(x.ends), "slope": x.slope}
    named[name.split(" ")[0]] = change(x)
    with pytest.raises(RuntimeError) as error:
        la2.extend(**named)
    text = str(error.value)
    assert text.startswith("la2::extend: ")
    assert all(any(option in text for option in word.split("|")) for word in words), text


NUMBERS = {  # what the values are, and the sentence
    "first": ({"cu_seqlens": [1, 3, 8]}, r"cu_seqlens\[0\] is 1, expected 0"),
    "order": ({"cu_seqlens": [0, 5, 3]}, r"cu_seqlens\[2\] is 3, expected at least cu_seqlens\[1\] = 5"),
    "too many": ({"cu_seqlens": [0, 5, 11]}, r"cu_seqlens\[-1\] is 11, expected at most the number of tokens, 10"),
    "read": ({"read_slots": [0, 9]}, r"read_slots\[1\] is 9, expected less than the 8 slots"),
    "write": ({"write_slots": [8, 0]}, r"write_slots\[0\] is 8, expected less than the 8 slots"),
    "twice": ({"read_slots": [3, 3]}, r"read_slots\[1\] is 3, expected another slot than read_slots\[0\]"),
    "another's": ({"read_slots": [3, 4], "write_slots": [4, 5]}, r"read_slots\[1\] is 4, .* write_slots\[0\] does"),
    "tokens": ({"snapshot_tokens": [6]}, r"snapshot_tokens\[0\] is 6, expected 0 to 5, the tokens of request 0"),
    "snapshot": ({"snapshot_slots": [1]}, r"snapshot_slots\[0\] is 1, expected another slot than read_slots\[1\]"),
    "offsets": ({"snapshot_offsets": [0, 1, 2]}, r"snapshot_offsets\[-1\] is 2, expected at most .* snapshots, 1"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_checks_numbers(device, monkeypatch, name):
    """On the CPU always; on a GPU they stand in its memory, and LA2_CHECK=1 fetches them."""
    monkeypatch.setenv("LA2_CHECK", "1")
    x = Problem(device, (5, 5), num_slots=8)
    values, sentence = NUMBERS[name]
    named = {"cu_seqlens": x.ends} | values
    if any(n.startswith("snapshot") for n in values):
        named = {"snapshot_offsets": [0, 1, 1], "snapshot_tokens": [2], "snapshot_slots": [7]} | named
    before = x.state.clone()
    for index_dtype in INDEX_DTYPES:
        x.index_dtype = index_dtype
        with pytest.raises(RuntimeError, match="la2::extend: " + sentence):
            la2.extend(x.q, x.k, x.v, x.state, **{n: x.index(value) for n, value in named.items()})
    assert torch.equal(x.state, before)
    la2.extend(x.q, x.k, x.v, x.state, x.index(x.ends), has_initial_state=torch.tensor([True, False], device=device))
