"""la2::extend against the recurrence in float64, request by request, and against itself in other pieces."""

import copy

import pytest
import torch

import lightning_attn2_ext
from tests.support.cases import Case, accumulation_dtype
from tests.support.pools import bits, pool_of
from tests.support.tolerance import check_forward

la2 = torch.ops.la2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = float("nan")
MIXED = (0, 1, 2, 63, 64, 65, 300)
INDEX_DTYPES = (torch.int32, torch.int64)


class Problem:
    """Requests and everything that extend takes. Of each request `slots` (read, write), `snapshots` [(count, slot)]."""

    def __init__(self, device, lengths, *, slots=None, fresh=(), snapshots=None, tail=0, heads=2, dims=(40, 24),
                 dtype=FP32, pool="kv", pool_dtype=None, index_dtype=torch.int32, slope="mixed", per_request=False,
                 scale=0.5, num_slots=None, seed=0):  # fmt: skip
        self.lengths, self.index_dtype, self.scale, self.device = lengths, index_dtype, scale, device
        self.slots = slots if slots is not None else [(r, r) for r in range(len(lengths))]
        self.has_slots = slots is not None
        self.fresh = fresh  # requests without an initial state
        self.snapshots = snapshots or [[] for _ in lengths]
        self.tokens = sum(lengths) + tail
        case = Case(heads=heads, length=max(self.tokens, 1), key_dim=dims[0], value_dim=dims[1], dtype=dtype,
                    slope=slope, layout="bnhd", state_layout=None, seed=seed)  # fmt: skip
        x = case.make(device)
        self.inputs = x
        self.q, self.k, self.v = (t[0].transpose(0, 1)[: self.tokens] for t in (x.q, x.k, x.v))  # [tokens, H, D]
        self.slope = x.slope
        if per_request and x.slope is not None:
            self.slope = torch.stack([x.slope * (1 + r) for r in range(len(lengths))])
        if num_slots is None:
            used = [s for pair in self.slots for s in pair] + [s for m in self.snapshots for _, s in m]
            num_slots = max(used, default=0) + 3
        acc = accumulation_dtype(dtype)
        self.state = pool_of((num_slots, heads, *dims), pool, pool_dtype or acc, device)

    @property
    def ends(self):
        return [sum(self.lengths[:r]) for r in range(len(self.lengths) + 1)]

    def index(self, values):
        return torch.tensor(values, dtype=self.index_dtype, device=self.device)

    @property
    def options(self):
        found = {"scale": self.scale}
        if self.has_slots:
            found["read_slots"] = self.index([r for r, _ in self.slots])
            if any(r != w for r, w in self.slots):
                found["write_slots"] = self.index([w for _, w in self.slots])
        if self.fresh:
            known = [r not in self.fresh for r in range(len(self.lengths))]
            found["has_initial_state"] = torch.tensor(known, device=self.device)
        if any(self.snapshots):
            counts = [len(m) for m in self.snapshots]
            found["snapshot_offsets"] = self.index([sum(counts[:r]) for r in range(len(counts) + 1)])
            found["snapshot_tokens"] = self.index([count for m in self.snapshots for count, _ in m])
            found["snapshot_slots"] = self.index([slot for m in self.snapshots for _, slot in m])
        return found

    def run(self, state=None):
        state = self.state if state is None else state
        return la2.extend(self.q, self.k, self.v, state, self.index(self.ends), self.slope, **self.options)

    def initial(self, r, before):
        read = self.slots[r][0]
        if read < 0 or r in self.fresh:
            return torch.zeros_like(before[0])
        return before[read]

    def sequences(self, before, pieces):
        """The packed forward over [(request, tokens from its start)], from the states in the pool `before`."""
        begins = [self.ends[r] for r, _ in pieces]
        counts = [n for _, n in pieces]
        rows = torch.cat([torch.arange(b, b + n, device=self.device) for b, n in zip(begins, counts, strict=True)])
        acc = accumulation_dtype(self.q.dtype)
        slope = self.slope
        if slope is not None and slope.dim() == 2:
            slope = slope[[r for r, _ in pieces]]
        packed = {name: getattr(self, name)[rows].transpose(0, 1)[None] for name in ("q", "k", "v")}
        cu_seqlens = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], device=self.device)
        state = torch.stack([self.initial(r, before) for r, _ in pieces]).to(acc)
        return self.inputs.replace(**packed, slope=slope, cu_seqlens=cu_seqlens, initial_state=state, scale=self.scale)

    def check(self, out, before, after):
        """Outputs, states, snapshots, and that everything else is untouched or zero."""
        live = [r for r, pair in enumerate(self.slots) if max(pair) >= 0]
        ends = self.ends
        assert out.shape == (self.tokens, *self.v.shape[1:]) and out.dtype == self.q.dtype
        zero = [i for r in range(len(self.lengths)) if r not in live for i in range(ends[r], ends[r + 1])]
        assert not out[zero + list(range(ends[-1], self.tokens))].any()
        if live:
            x = self.sequences(before, [(r, self.lengths[r]) for r in live])
            rows = [i for r in live for i in range(ends[r], ends[r + 1])]
            check_forward(x, out[rows].transpose(0, 1)[None])
        pieces = [(r, self.lengths[r], w) for r, (_, w) in enumerate(self.slots) if w >= 0]
        pieces += [(r, n, slot) for r, found in enumerate(self.snapshots) for n, slot in found if slot >= 0]
        if pieces:
            written = after[[slot for *_, slot in pieces]]
            check_forward(self.sequences(before, [(r, n) for r, n, _ in pieces]), None, written.to(x_acc(self.q)))
        others = sorted(set(range(len(after))) - {slot for *_, slot in pieces})
        assert torch.equal(bits(after[others]), bits(before[others]))

    def run_and_check(self):
        before = self.state.clone()
        out = self.run()
        self.check(out, before, self.state)
        return out


def x_acc(q):
    return accumulation_dtype(q.dtype)


def slots_of(lengths, apart=True):
    """Distinct slots in no order; every other request writes elsewhere if `apart`."""
    count = len(lengths)
    reads = torch.randperm(2 * count, generator=torch.Generator().manual_seed(count)).tolist()[:count]
    return [(slot, 2 * count + r if apart and r % 2 == 0 else slot) for r, slot in enumerate(reads)]


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


# ---- on a GPU: plans, graphs, memory


def plans(dtype):
    """Every family that this GPU has for the dtype, in one piece and cut."""
    if not torch.cuda.is_available():
        return ("",)
    family = ("simt",) if dtype in (FP32, FP64) else ("sm80",)
    if dtype not in (FP32, FP64) and torch.cuda.get_device_capability() == (9, 0):
        family += ("sm90",)
    return tuple(f"family={f},segments={n}" for f in family for n in (1, 2, 3, 7))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16, FP64))
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
def test_every_family(monkeypatch, dtype, pool):
    """Cut requests read and write one slot in place; their first segment may not see what the last one wrote."""
    lengths = (1000, 1, 64, 0, 300, 2, 700)
    snapshots = [[(100, 30), (1000, 31)], [(1, 32)], [], [(0, 33)], [], [], [(699, 34)]]
    for plan in plans(dtype):
        monkeypatch.setenv("LA2_PLAN", plan)
        for dims in ((64, 64), (128, 128), (256, 64)):
            narrow = None if dtype == FP64 else BF16
            x = Problem("cuda", lengths, slots=slots_of(lengths, apart=dims == (64, 64)), snapshots=snapshots,
                        dtype=dtype, pool=pool, dims=dims, pool_dtype=narrow, fresh=(4,), tail=11,
                        slope="usual")  # fmt: skip
            wide = pool_of(x.state.shape, pool, accumulation_dtype(dtype), "cuda").copy_(x.state)
            before = wide.clone()
            out = x.run(wide)
            x.check(out, before, wide)
            assert torch.equal(out, x.run())
            assert torch.equal(x.state, wide.to(x.state.dtype))


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("dims", ((64, 40), (128, 128), (256, 64)))
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
@pytest.mark.parametrize("dtype", (FP32, BF16, FP64))
@pytest.mark.parametrize("family", ("simt", "sm80", "hopper"))  # tests/record.py leaves some to some tools, by name
def test_tiny(monkeypatch, family, dtype, pool, dims):
    """Every kernel of an extend, for compute-sanitizer; the truth is computed on the CPU."""
    lengths = (67, 1, 0, 130, 2, 3)
    slots = [(0, 0), (1, 1), (2, 3), (4, 5), (6, 6), (-1, -1)]
    snapshots = [[(64, 7), (65, 8)], [], [(0, 9)], [], [], []]
    name = {"hopper": "sm90"}.get(family, family)
    chosen = [p for p in plans(dtype) if "segments=7" not in p and name in p]
    if not chosen:
        pytest.skip(f"{family} has no kernels for this dtype here")
    for plan in chosen:
        monkeypatch.setenv("LA2_PLAN", plan)
        x = Problem("cpu", lengths, slots=slots, snapshots=snapshots, heads=1, dims=dims, dtype=dtype, pool=pool,
                    pool_dtype=FP64 if dtype == FP64 else BF16, fresh=(4,), tail=2)  # fmt: skip
        y = copy.copy(x)
        y.device = "cuda"
        y.q, y.k, y.v, y.slope = (t.to("cuda") for t in (x.q, x.k, x.v, x.slope))
        x.state = x.state.to(x_acc(x.q))
        y.state = pool_of(x.state.shape, pool, x.state.dtype, "cuda").copy_(x.state)
        narrow = pool_of(x.state.shape, pool, FP64 if dtype == FP64 else BF16, "cuda").copy_(x.state)
        out, after = y.run().cpu(), y.state.cpu()
        x.check(out, x.state, after)
        assert torch.equal(out, y.run(narrow).cpu()) and torch.equal(narrow.cpu(), after.to(narrow.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
def test_aligned_cuts_are_exact(monkeypatch, dtype):
    """With one plan a request cut at multiples of the chunk gives the bits of the whole one."""
    for plan in plans(dtype):
        if "segments=1" not in plan:
            continue
        monkeypatch.setenv("LA2_PLAN", plan + (",slice=64" if dtype != FP64 else ""))
        whole = Problem("cuda", (500,), dtype=dtype, dims=(128, 128), slope="usual", scale=1.0)
        state = whole.state.clone()
        outs = []
        for lo, hi in ((0, 128), (128, 192), (192, 448), (448, 500)):
            ends = whole.index([0, hi - lo])
            outs.append(la2.extend(whole.q[lo:hi], whole.k[lo:hi], whole.v[lo:hi], state, ends, whole.slope))
        assert torch.equal(torch.cat(outs), whole.run())
        assert torch.equal(state, whole.state)


@pytest.mark.gpu
@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
def test_pool_with_its_slots_scattered(monkeypatch, pool_dtype):
    """[H, slots, D, E] in memory; requests are cut, which read and write one slot."""
    monkeypatch.setenv("LA2_PLAN", "segments=3")
    lengths = (700, 1, 64, 300)
    x = Problem("cuda", lengths, slots=slots_of(lengths, apart=False), dtype=BF16, dims=(128, 128), heads=3,
                pool_dtype=pool_dtype, slope="usual")  # fmt: skip
    x.state = x.state.transpose(0, 1).contiguous().transpose(0, 1)
    x.run_and_check()


@pytest.mark.gpu
def test_requests_are_cut_where_it_gains(monkeypatch):
    """The device decides by the lengths: of alike ones none is cut, of unlike ones the long one; its state tells."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("decided on Hopper alone")
    # Longer than a segment, and not longer than what a lane walks; then one that is.
    for lengths, cuts in (((*[2000] * 5, *[425] * 15), False), ((8192, *[431] * 19), True)):
        x = Problem("cuda", lengths, dtype=BF16, dims=(128, 128), heads=8, slope="none")
        before = x.state.clone()
        free = x.state.clone()
        out = x.run(free)
        x.check(out, before, free)
        monkeypatch.setenv("LA2_PLAN", "slice=64,segments=1")
        x.run()
        changed = [r for r in range(len(lengths)) if not torch.equal(free[r], x.state[r])]
        assert changed == ([0] if cuts else [])
        monkeypatch.delenv("LA2_PLAN")


@pytest.mark.gpu
@pytest.mark.parametrize("pool, slope", (("kv", "usual"), ("vk", "none")))
@pytest.mark.parametrize("heads, dims", ((8, (128, 128)), (3, (64, 64)), (8, (128, 40))))
def test_what_is_cut_waits_beside_what_is_not(monkeypatch, heads, dims, pool, slope):
    """Requests that are not cut are done while states of the others are still gathered: the same bits every time, also
    where the memory of those states holds another batch's, alike but for its numbers."""
    lengths = (5000, *[431] * 12, 1, 0, 3000)
    snapshots = [[(4000, 50)], *[[] for _ in lengths[2:]], [(64, 51)]]
    x, other = (
        Problem("cuda", lengths, slots=slots_of(lengths), snapshots=snapshots, dtype=BF16, dims=dims, heads=heads,
                pool=pool, slope=slope, fresh=(3,), tail=9, num_slots=52, seed=seed)
        for seed in (0, 1)
    )  # fmt: skip
    before = x.state.clone()
    out = x.run_and_check()
    for _ in range(20):
        again = pool_of(x.state.shape, pool, x.state.dtype, "cuda").copy_(before)
        other.run()
        out_again = x.run(again)
        other.run()
        assert torch.equal(out, out_again)
        assert torch.equal(x.state, again)
    if torch.cuda.get_device_capability() == (9, 0) and slope == "none":  # then the state tells that it was cut
        monkeypatch.setenv("LA2_PLAN", "slice=64,segments=1")
        x.run(again.copy_(before))
        assert not torch.equal(again[x.slots[0][1]], x.state[x.slots[0][1]])


@pytest.mark.gpu
@pytest.mark.parametrize("heads, dims", ((1, (64, 64)), (8, (128, 128)), (40, (64, 128)), (2, (256, 256))))
@pytest.mark.parametrize("count", (20, 150))
@pytest.mark.parametrize("plan", ("", "segments=9"))
def test_every_unit_is_dealt(monkeypatch, heads, dims, count, plan):
    """Of few and many requests, to few and many lanes, with one long among them."""
    monkeypatch.setenv("LA2_PLAN", plan)
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(0, 6000 // count, (count,), generator=generator).tolist()
    lengths[count // 2] = 3000
    x = Problem("cuda", lengths, slots=slots_of(lengths), dtype=BF16, dims=dims, heads=heads, slope="usual")
    before = x.state.clone()
    out = x.run_and_check()
    assert torch.equal(out, x.run(before))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ("", "segments=1", "segments=3"))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_graph(monkeypatch, dtype, plan):
    """Captured with room for more tokens and requests, replayed with other lengths, slots and snapshots."""
    monkeypatch.setenv("LA2_PLAN", plan)
    requests, tokens = 6, 640
    x = Problem("cuda", (0,) * requests, tail=tokens, slots=[(r, r) for r in range(requests)], dtype=dtype,
                dims=(64, 64), num_slots=24, slope="usual")  # fmt: skip
    ends, read, write = x.index([0] * (requests + 1)), x.index([-1] * requests), x.index([-1] * requests)
    known = torch.ones(requests, dtype=torch.bool, device="cuda")
    offsets, counts, saved = x.index([0] * (requests + 1)), x.index([0] * 4), x.index([-1] * 4)
    options = {"read_slots": read, "write_slots": write, "has_initial_state": known, "snapshot_offsets": offsets,
               "snapshot_tokens": counts, "snapshot_slots": saved, "scale": x.scale}  # fmt: skip
    x_run = lambda: la2.extend(x.q, x.k, x.v, x.state, ends, x.slope, **options)  # noqa: E731
    x_run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x_run()
    for lengths, slots, fresh, snapshots in (
        ((1, 1, 1, 1, 0, 0), [(3, 3), (1, 1), (0, 7), (-1, -1), (-1, -1), (2, 8)], (1,), [[]] * 6),
        (
            (300, 0, 1, 200, 139, 0),
            [(r, r + 6) for r in range(6)],
            (),
            [[(64, 20), (300, 21)], [], [(1, 22)]] + [[]] * 3,
        ),
        ((640, 0, 0, 0, 0, 0), [(5, 5)] + [(-1, -1)] * 5, (), [[(0, 12), (1, 13), (333, 14), (640, 15)]] + [[]] * 5),
        ((2, 63, 64, 65, 1, 400), [(9, 9), (-1, -1), (8, 8), (7, 7), (6, 6), (5, 5)], (0, 5), [[]] * 6),
    ):
        x.lengths, x.slots, x.fresh, x.snapshots = lengths, slots, fresh, snapshots
        ends.copy_(x.index(x.ends))
        read.copy_(x.index([s for s, _ in slots]))
        write.copy_(x.index([s for _, s in slots]))
        known.copy_(torch.tensor([r not in fresh for r in range(requests)]))
        flat = [pair for found in snapshots for pair in found]
        offsets.copy_(x.index([sum(map(len, snapshots[:r])) for r in range(requests + 1)]))
        counts.copy_(x.index([n for n, _ in flat] + [0] * (4 - len(flat))))
        saved.copy_(x.index([s for _, s in flat] + [-1] * (4 - len(flat))))
        before = x.state.clone()
        graph.replay()
        x.check(out, before, x.state)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ("", "family=sm80,segments=2"))
@pytest.mark.parametrize("offsets", ([0, 2, 0, 2], [2, 0, 0, 0], [-5, 1, 99, 1], [0, 0, 0, 0]))
def test_snapshots_that_several_requests_claim(monkeypatch, offsets, plan):
    """Offsets that nobody has checked: some request's snapshot, always the same one, or none; nothing else changes."""
    monkeypatch.setenv("LA2_PLAN", plan)
    lengths, slots, snapshots = (300, 70, 5), [(0, 1), (2, 3), (4, 5)], [[(300, 7), (5, 8)], [], []]

    def run(given, **options):
        x = Problem("cuda", lengths, slots=slots, snapshots=given, dtype=BF16, dims=(64, 64), num_slots=12)
        options = x.options | {name: x.index(values) for name, values in options.items()}
        return la2.extend(x.q, x.k, x.v, x.state, x.index(x.ends), x.slope, **options), x.state

    want, states = run(None)
    first, second = run(snapshots, snapshot_offsets=offsets), run(snapshots, snapshot_offsets=offsets)
    assert torch.equal(first[0], want) and torch.equal(second[0], want)
    assert torch.equal(first[1], second[1])
    others = [slot for slot in range(12) if slot not in (7, 8)]
    assert torch.equal(first[1][others], states[others])
    assert first[1].isfinite().all()


@pytest.mark.gpu
def test_memory_that_was_something_else(monkeypatch):
    """Results and workspaces lie in memory full of NaN."""
    lengths = (500, 1, 0, 70, 3)
    slots = [(0, 0), (1, 1), (2, 5), (-1, -1), (3, 3)]
    for plan in ("segments=1", "segments=3"):
        monkeypatch.setenv("LA2_PLAN", plan)
        for dtype in (FP32, BF16):
            x = Problem("cuda", lengths, slots=slots, dtype=dtype, dims=(64, 64), tail=100)
            before = x.state.clone()
            blocks = [torch.full((n,), NAN, device="cuda") for n in (*[5 << 20] * 8, *[1 << 17] * 64, *[128] * 512)]
            torch.cuda.synchronize()
            del blocks
            x.check(x.run(), before, x.state)


@pytest.mark.gpu
def test_does_not_wait_for_the_gpu():
    x = Problem("cuda", MIXED, slots=slots_of(MIXED), snapshots=[[]] * 6 + [[(64, 40)]], dtype=BF16)
    ends, options = x.index(x.ends), x.options
    call = lambda: la2.extend(x.q, x.k, x.v, x.state, ends, x.slope, **options)  # noqa: E731
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        torch.cuda._sleep(200_000_000)
        call()
        assert not torch.cuda.current_stream().query(), "it waited, or the sleep was too short to tell"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(2))
def test_many_requests(seed):
    """More than one block of the plan has threads for, of every kind; so many states are cut into larger parts too."""
    generator = torch.Generator().manual_seed(seed)
    count = 1500
    lengths = torch.randint(0, 4, (count,), generator=generator).tolist()
    lengths[700] = 130
    slots = [(s, s) for s in torch.randperm(2 * count, generator=generator)[:count].tolist()]
    slots = [(-1, -1) if r % 11 == 0 else pair for r, pair in enumerate(slots)]
    dtype, dims, pool = ((FP32, (24, 16), "kv"), (BF16, (16, 24), "vk"))[seed]
    Problem("cuda", lengths, slots=slots, heads=1, dims=dims, dtype=dtype, pool=pool, slope="usual",
            num_slots=2 * count, tail=50).run_and_check()  # fmt: skip
