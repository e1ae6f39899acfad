"""decode, verify and commit against the recurrence in float64, against each other, and what they must not touch."""

import pytest
import torch

import lightning_attn2_ext
from tests.support.cases import Case, accumulation_dtype
from tests.support.pools import bits, pool_of
from tests.support.tolerance import check_forward, forward_truth

la2 = torch.ops.la2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = float("nan")
MOST = 16  # tokens
POOLS = ("kv", "vk", "padded")
INDEX_DTYPES = (torch.int32, torch.int64)
SLOTS = (6, 2, -1, 0, 7)  # of five rows; slots 1, 3, 4, 5, 8 are nobody's
ACCEPTED = (2, 0, 3, 99, -4)


class Problem:
    """Rows of `tokens` tokens and everything that the three operators take."""

    def __init__(self, device, tokens=4, *, slots=SLOTS, heads=2, dims=(40, 24), dtype=FP32, pool="kv", pool_dtype=None,
                 index_dtype=torch.int32, slope="mixed", per_row=False, scale=0.5, num_slots=9):  # fmt: skip
        self.device, self.tokens, self.slots, self.scale, self.index_dtype = device, tokens, slots, scale, index_dtype
        case = Case(heads=heads, batch=len(slots), length=tokens, key_dim=dims[0], value_dim=dims[1], dtype=dtype,
                    slope=slope, slope_per_seq=per_row, layout="bnhd", state_layout=None)  # fmt: skip
        self.inputs = case.make(device)
        self.q, self.k, self.v = (t.transpose(1, 2) for t in (self.inputs.q, self.inputs.k, self.inputs.v))
        self.slope, self.acc, self.pool = self.inputs.slope, accumulation_dtype(dtype), pool
        self.state = pool_of((num_slots, heads, *dims), pool, pool_dtype or self.acc, device)
        for slot in set(range(num_slots)) - set(slots):
            self.state[slot] = NAN

    def index(self, values):
        return torch.tensor(values, dtype=self.index_dtype, device=self.device)

    def counts(self, accepted):
        return [min(max(a, 0), self.tokens) if s >= 0 else 0 for a, s in zip(accepted, self.slots, strict=True)]

    @property
    def live(self):
        return [row for row, slot in enumerate(self.slots) if slot >= 0]

    def copy(self, dtype=None):
        """The pool in memory of its own, laid out alike."""
        return pool_of(self.state.shape, self.pool, dtype or self.state.dtype, self.device).copy_(self.state)

    def verify(self, state):
        return la2.verify(self.q, self.k, self.v, state, self.slope, state_indices=self.index(self.slots),
                          scale=self.scale)  # fmt: skip

    def commit(self, state, accepted):
        assert la2.commit(self.k, self.v, state, self.index(accepted), self.slope,
                          state_indices=self.index(self.slots)) is None  # fmt: skip

    def decode(self, state, token, rows=None):
        slots = [slot if rows is None or row in rows else -1 for row, slot in enumerate(self.slots)]
        q, k, v = (t[:, token] for t in (self.q, self.k, self.v))
        return la2.decode(q, k, v, state, self.slope, state_indices=self.index(slots), scale=self.scale)

    def sequences(self, rows, before, count):
        """`count` tokens of some rows, from the states in the pool `before`, for check_forward."""
        x = self.inputs
        slope = x.slope if x.slope is None or x.slope.dim() == 1 else x.slope[rows]
        tokens = {name: getattr(self, name)[rows, :count].transpose(1, 2) for name in ("q", "k", "v")}
        state = before[[self.slots[row] for row in rows]].to(self.acc)
        return x.replace(**tokens, slope=slope, initial_state=state, scale=self.scale)

    def check_out(self, out, before):
        assert out.shape == (len(self.slots), self.tokens, *self.v.shape[2:]) and out.dtype == self.q.dtype
        live = self.live
        check(self.sequences(live, before, self.tokens), out[live].transpose(1, 2))
        assert not out[[row for row in range(len(self.slots)) if row not in live]].any()

    def check_states(self, after, before, counts):
        """Of a pool in the accumulation dtype."""
        for count in set(counts) - {0}:
            rows = [row for row, c in enumerate(counts) if c == count]
            check(self.sequences(rows, before, count), None, after[[self.slots[row] for row in rows]])
        check_others(after, before, [slot for slot, count in zip(self.slots, counts, strict=True) if count])


def check(x, out, state=None):
    """In float64 the truth is off by as much as the result may be."""
    check_forward(x, out, state, against=tuple(forward_truth(x).values()) if x.q.dtype == FP64 else None)


def memory_of(state):
    return state if state._base is None else state._base


def check_others(after, before, written):
    """All of the pool's memory but the states that were written, gaps between rows too, keeps every bit."""
    one, two = memory_of(after).clone(), memory_of(before).clone()
    for memory in (one, two):
        view = memory.as_strided(after.shape, after.stride())
        view[written] = 0
    assert torch.equal(bits(one), bits(two))


# ---- against the recurrence


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16, FP64))
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("tokens", (1, 2, 5, 8, MOST))
def test_values(device, dtype, pool, tokens):
    for index_dtype in INDEX_DTYPES:
        for dims in ((40, 24), (128, 128)):
            x = Problem(device, tokens, dtype=dtype, pool=pool, dims=dims, index_dtype=index_dtype,
                        per_row=index_dtype == torch.int64, slope="usual")  # fmt: skip
            before, state = x.copy(), x.copy()
            x.check_out(x.verify(state), before)
            check_others(state, before, [])
            for accepted in (ACCEPTED, [tokens] * 5, range(5)):
                state = x.copy()
                x.commit(state, list(accepted))
                x.check_states(state, before, x.counts(accepted))


@pytest.mark.parametrize("dims", ((8, 8), (8, 136), (64, 64), (136, 256), (256, 128), (256, 256)))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_other_dims(device, dtype, dims):
    for pool in POOLS:
        x = Problem(device, 3, dtype=dtype, pool=pool, dims=dims, heads=3)
        before, state = x.copy(), x.copy()
        x.check_out(x.verify(state), before)
        x.commit(state, ACCEPTED)
        x.check_states(state, before, x.counts(ACCEPTED))


@pytest.mark.parametrize("slope", ("none", "zero", "extreme"))
def test_slopes_at_the_ends(device, slope):
    x = Problem(device, 4, slope=slope)
    before, state = x.copy(), x.copy()
    x.check_out(x.verify(state), before)
    x.commit(state, ACCEPTED)
    x.check_states(state, before, x.counts(ACCEPTED))


def test_every_count(device):
    """Any number of any number of tokens; the tokens that were not accepted are not looked at."""
    slots = tuple(range(MOST + 1))
    for tokens in range(1, MOST + 1):
        x = Problem(device, tokens, slots=slots, num_slots=MOST + 2, dims=(16, 24))
        before, state = x.copy(), x.copy()
        x.k, x.v = x.k.clone(), x.v.clone()
        counts = x.counts(range(MOST + 1))
        kept = x.k.clone(), x.v.clone()
        for row, count in enumerate(counts):
            x.k[row, count:], x.v[row, count:] = NAN, NAN
        x.commit(state, list(range(MOST + 1)))
        x.k, x.v = kept
        x.check_states(state, before, counts)


def test_rows_are_slots_without_indices(device):
    x = Problem(device, 3, slots=(0, 1, 2), num_slots=3)
    before, state = x.copy(), x.copy()
    x.check_out(la2.verify(x.q, x.k, x.v, state, x.slope, scale=x.scale), before)
    la2.commit(x.k, x.v, state, x.index([3, 0, 1]), x.slope)
    x.check_states(state, before, [3, 0, 1])


# ---- bfloat16 pools


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dims", ((40, 24), (128, 128), (256, 64)))
def test_bfloat16_pools_round_once(device, dtype, pool, dims):
    """Of the same values in float32: the states of that pool, rounded once a call, and the outputs."""
    for tokens in (1, 3, 8):
        x = Problem(device, tokens, dtype=dtype, pool=pool, dims=dims, pool_dtype=BF16)
        before, narrow, wide = x.copy(), x.copy(), x.copy(FP32)
        out, out_wide = x.verify(narrow), x.verify(wide)
        check_others(narrow, before, [])
        x.check_out(out, before)
        if device == "cpu":  # a GPU may cut the sum over D otherwise
            assert torch.equal(out, out_wide)
        x.commit(narrow, ACCEPTED)
        x.commit(wide, ACCEPTED)
        check_rounded(x, narrow, wide, before, x.counts(ACCEPTED))

        narrow, wide = x.copy(), x.copy(FP32)
        one = Problem(device, 1, dtype=dtype, pool=pool, dims=dims, pool_dtype=BF16)
        one.q, one.k, one.v = x.q[:, :1], x.k[:, :1], x.v[:, :1]
        one.check_out(x.decode(narrow, 0)[:, None], before)
        x.decode(wide, 0)
        check_rounded(one, narrow, wide, before, one.counts([1] * 5))


def check_rounded(x, narrow, wide, before, counts):
    """The states of a bfloat16 pool are those of the float32 one, rounded to nearest; nothing else was written."""
    written = [slot for slot, count in zip(x.slots, counts, strict=True) if count]
    assert torch.equal(narrow[written], wide[written].to(BF16))
    check_others(narrow, before, written)
    x.check_states(wide, pool_of(before.shape, x.pool, FP32, x.device).copy_(before), counts)


# ---- against decode


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16, FP64))
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dims", ((40, 24), (128, 128), (256, 136)))
def test_the_bits_of_decode_steps(device, dtype, pool, dims):
    for tokens in (1, 4, MOST):
        x = Problem(device, tokens, dtype=dtype, pool=pool, dims=dims, slope="usual")
        counts = x.counts(ACCEPTED)
        committed, stepped, accepted = x.copy(), x.copy(), x.copy()
        out = x.verify(committed)
        x.commit(committed, ACCEPTED)
        for token in range(tokens):
            assert torch.equal(x.decode(stepped, token), out[:, token])
            x.decode(accepted, token, [row for row, count in enumerate(counts) if token < count])
        assert torch.equal(bits(committed), bits(accepted))


def test_twice_gives_the_same(device):
    for pool_dtype in (FP32, BF16):
        x = Problem(device, 8, dtype=BF16, dims=(128, 128), pool_dtype=pool_dtype)
        one, two = x.copy(), x.copy()
        assert torch.equal(x.verify(one), x.verify(two))
        x.commit(one, ACCEPTED)
        x.commit(two, ACCEPTED)
        assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("pool", ("kv", "vk"))
@pytest.mark.parametrize("dims", ((40, 72), (72, 24), (104, 40), (128, 64), (64, 128)))
def test_many_rows_are_as_few_at_a_time(device, dtype, pool, dims):
    """Many states are cut into larger parts than few (simt/with_state_part.cuh), also where those do not divide D."""
    count, few = 300, 50
    x = Problem(device, 3, dtype=dtype, pool=pool, dims=dims, slots=tuple(range(count)), heads=4, num_slots=count)
    accepted = [row % 4 for row in range(count)]
    whole, parts = x.copy(), x.copy()
    out, step = x.verify(whole), x.decode(whole, 0)
    x.commit(whole, accepted)
    for first in range(0, count, few):
        rows = slice(first, first + few)
        q, k, v, slots = x.q[rows], x.k[rows], x.v[rows], x.index(range(first, first + few))
        options = {"state_indices": slots}
        assert torch.equal(la2.verify(q, k, v, parts, x.slope, **options, scale=x.scale), out[rows])
        token = (t[:, 0] for t in (q, k, v))
        assert torch.equal(la2.decode(*token, parts, x.slope, **options, scale=x.scale), step[rows])
        la2.commit(k, v, parts, x.index(accepted[rows]), x.slope, **options)
    assert torch.equal(bits(whole), bits(parts))


# ---- padding


@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_padding_everywhere(device, pool_dtype, index_dtype):
    least = torch.iinfo(index_dtype).min
    x = Problem(device, 3, slots=(-1, -7, least), index_dtype=index_dtype, pool_dtype=pool_dtype)
    before, state = x.copy(), x.copy()
    assert not x.verify(state).any()
    x.commit(state, [3, 1, 2])
    assert not x.decode(state, 0).any()
    check_others(state, before, [])


@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
def test_nothing_accepted(device, pool_dtype):
    """Every bit stays, of a NaN too, which rounding would replace."""
    x = Problem(device, 4, pool_dtype=pool_dtype)
    state = x.copy()
    state.view(torch.int16 if pool_dtype == BF16 else torch.int32)[0] = 0x7FA5 << (0 if pool_dtype == BF16 else 16)
    assert state[0].isnan().all()
    before = state.clone()
    for accepted in (0, -1, torch.iinfo(torch.int32).min):
        x.commit(state, [accepted] * 5)
        assert torch.equal(bits(state), bits(before))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_far_counts_are_clamped(device, index_dtype):
    far = torch.iinfo(index_dtype)
    x = Problem(device, 3, index_dtype=index_dtype)
    one, two = x.copy(), x.copy()
    x.commit(one, [far.max, far.min, 4, 3, 1])
    x.commit(two, [3, 0, 3, 3, 1])
    assert torch.equal(bits(one), bits(two))


def test_no_rows(device):
    x = Problem(device, 2, slots=(), num_slots=3)
    before, state = x.copy(), x.copy()
    assert x.verify(state).shape == (0, 2, 2, 24)
    x.commit(state, [])
    assert torch.equal(bits(state), bits(before))


# ---- strides


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_views_into_a_packed_projection(device, dtype):
    x = Problem(device, 5, dtype=dtype, dims=(64, 64))
    before, split = x.copy(), x.inputs
    for dim, sizes in ((3, 64), (2, 2)):  # [rows, T, H, 3 D] and [rows, T, 3 H, D]
        packed = torch.cat([t.contiguous() for t in (x.q, x.k, x.v)], dim)
        x.q, x.k, x.v = packed.split(sizes, dim)
        assert not x.q.is_contiguous()
        x.inputs, state = split, x.copy()
        x.check_out(x.verify(state), before)
        x.commit(state, ACCEPTED)
        x.check_states(state, before, x.counts(ACCEPTED))


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_turned_rows_are_copied(device, dtype):
    x = Problem(device, 4, dtype=dtype)
    want, one, two = x.verify(x.copy()), x.copy(), x.copy()
    x.commit(one, ACCEPTED)
    x.q, x.k, x.v = (t.mT.contiguous().mT for t in (x.q, x.k, x.v))
    assert torch.equal(x.verify(two), want)
    x.commit(two, ACCEPTED)
    assert torch.equal(bits(one), bits(two))


# ---- torch


def arguments(x, operator):
    """(positional, keyword) arguments of an operator."""
    indices = {"state_indices": x.index(x.slots)}
    if operator == "commit":
        return (x.k, x.v, x.state, x.index(ACCEPTED), x.slope), indices
    rows = (x.q, x.k, x.v) if operator == "verify" else (x.q[:, 0], x.k[:, 0], x.v[:, 0])
    return (*rows, x.state, x.slope), indices | {"scale": x.scale}


OPERATORS = ("decode", "verify", "commit")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
@pytest.mark.parametrize("kind", ("plain", "slots", "vk"))
def test_opcheck(device, operator, pool_dtype, kind):
    slots = SLOTS if kind == "slots" else range(5)
    x = Problem(device, 3, slots=slots, num_slots=9 if kind == "slots" else 5, pool_dtype=pool_dtype,
                pool="vk" if kind == "vk" else "kv", dims=(16, 24))  # fmt: skip
    x.state.nan_to_num_()
    args, options = arguments(x, operator)
    if kind == "plain":
        args, options = args[:-1], {}
    torch.library.opcheck(getattr(la2, operator).default, args, options)


def test_compiles_whole(device):
    x = Problem(device, 3)
    state, twin = x.copy(), x.copy()

    def step(q, k, v, state, accepted, slope, slots):
        out = la2.verify(q * 2, k, v, state, slope, state_indices=slots)
        la2.commit(k, v, state, accepted, slope, state_indices=slots)
        return out + state[0, 0, 0, 0]

    rest = x.index(ACCEPTED), x.slope, x.index(SLOTS)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x.q, x.k, x.v, state, *rest)
    assert torch.equal(got, step(x.q, x.k, x.v, twin, *rest))
    assert torch.equal(bits(state), bits(twin))


def test_the_functions_are_the_operators(device):
    x = Problem(device, 3)
    one, two, options = x.copy(), x.copy(), {"state_indices": x.index(SLOTS)}
    out = lightning_attn2_ext.verify(x.q, x.k, x.v, one, x.slope, **options, scale=x.scale)
    assert torch.equal(out, x.verify(two))
    assert lightning_attn2_ext.commit(x.k, x.v, one, x.index(ACCEPTED), x.slope, **options) is None
    x.commit(two, ACCEPTED)
    assert torch.equal(bits(one), bits(two)) and not torch.equal(bits(one), bits(x.state))


@pytest.mark.parametrize(
    "operator, name",
    [(o, n) for o in OPERATORS for n in ("q", "k", "v", "slope", "state") if (o, n) != ("commit", "q")],
)
def test_refuses_to_differentiate(device, operator, name):
    x = Problem(device, 2)
    before = x.state.clone()
    getattr(x, name).requires_grad_()
    args, options = arguments(x, operator)
    call = getattr(la2, operator)
    sentence = f"la2::{operator}: {name} requires grad, expected"
    with pytest.raises(RuntimeError, match=sentence):
        call(*args, **options)
    with torch.no_grad():
        if name == "state" and operator != "verify":
            with pytest.raises(RuntimeError, match=sentence):
                call(*args, **options)
            assert torch.equal(bits(x.state.detach()), bits(before))
        else:
            call(*args, **options)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_says_whether_it_changed_its_state(device, operator, mode):
    x = Problem(device, 2)
    version = x.state._version
    args, options = arguments(x, operator)
    with mode():
        getattr(la2, operator)(*args, **options)
    assert x.state._version == version + (operator != "verify")


@pytest.mark.parametrize("operator", OPERATORS)
def test_inference_tensors(device, operator):
    with torch.inference_mode():
        x = Problem(device, 2)
        assert x.state.is_inference() and x.q.is_inference()
        args, options = arguments(x, operator)
        getattr(la2, operator)(*args, **options)


@pytest.mark.parametrize("operator", ("verify", "commit"))
@pytest.mark.parametrize("dim", (0, 1, 4))
@pytest.mark.parametrize("names", (("k", "v"), ("k",), ("v",), ("slope",)), ids="+".join)
def test_vmap(device, operator, dim, names):
    x = Problem(device, 3, dtype=FP64)
    values = {"q": x.q, "k": x.k, "v": x.v, "slope": x.slope}
    dims = dict.fromkeys(values)
    for name in names:
        dims[name] = values[name].dim()
        values[name] = torch.stack([values[name] * i for i in (1, 2, 3)], -1)
    states = torch.stack([x.state, 2 * x.state, -x.state], dim)
    before, expected = states.clone(), states.clone()
    slots, accepted = x.index(SLOTS), x.index(ACCEPTED)

    def call(q, k, v, slope, state):
        if operator == "verify":
            return la2.verify(q, k, v, state, slope, state_indices=slots, scale=0.5)
        la2.commit(k, v, state, accepted, slope, state_indices=slots)
        return state

    got = torch.vmap(call, in_dims=(*dims.values(), dim))(*values.values(), states)
    for i in range(3):
        rows = [t if dims[n] is None else t.select(dims[n], i) for n, t in values.items()]
        want = call(*rows, expected.select(dim, i))
        torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.equal(bits(states), bits(before)) == (operator == "verify")


def test_vmap_of_verify_shares_a_state(device):
    x = Problem(device, 3, dtype=FP64)
    slots = x.index(SLOTS)
    got = torch.vmap(lambda q: la2.verify(q, x.k, x.v, x.state, x.slope, state_indices=slots))(torch.stack((x.q, -x.q)))
    want = la2.verify(x.q, x.k, x.v, x.state, x.slope, state_indices=slots)
    torch.testing.assert_close(got, torch.stack((want, -want)), rtol=1e-12, atol=1e-12)


def test_refuses_vmap(device):
    x = Problem(device, 3, slots=range(5), num_slots=5)
    accepted, states = x.index(ACCEPTED), torch.stack((x.state, x.state))
    twice = torch.stack((accepted, accepted))
    for name, call, mapped in (
        ("commit: state is not", lambda k: la2.commit(k, x.v, x.state, accepted), (torch.stack((x.k, x.k)),)),
        ("commit: num_accepted is", lambda s, n: la2.commit(x.k, x.v, s, n), (states, twice)),
        ("verify: state_indices is", lambda i: la2.verify(x.q, x.k, x.v, x.state, state_indices=i), (twice,)),
    ):
        with pytest.raises(NotImplementedError, match=f"la2::{name} mapped by vmap"):
            torch.vmap(call)(*mapped)


def test_autocast(device):
    x, y = Problem(device, 3), Problem(device, 3)
    one, two = x.copy(), x.copy()
    with torch.autocast(device, BF16):
        out = x.verify(one)
        x.commit(one, ACCEPTED)
    y.q, y.k, y.v = (t.to(BF16) for t in (y.q, y.k, y.v))
    assert out.dtype == BF16 and torch.equal(out, y.verify(two))
    y.commit(two, ACCEPTED)
    assert torch.equal(bits(one), bits(two))


# ---- what is refused

REFUSED = {  # operators, argument, what it becomes, words of the sentence
    "rank": ("verify commit", "k", lambda x: x.k[0], ("k has shape [3, 2, 40]", "[rows, tokens, heads, head_dim]")),
    "tokens": ("verify commit", "v", lambda x: x.v[:, :-1], ("v.shape[1] is 2", "expected 3")),
    "rows": ("verify", "k", lambda x: x.k[:-1], ("k.shape[0] is 4", "expected 5 as for q")),
    "heads": ("verify commit", "v", lambda x: x.v[:, :, :1], ("v.shape[2] is 1", "expected 2")),
    "head dim": ("verify commit", "v", lambda x: x.v[..., :20], ("v.shape[-1] is 20", "multiple of 8")),
    "dtype": ("verify commit", "v", lambda x: x.v.half(), ("v.dtype is float16", "expected float32")),
    "state": ("decode verify commit", "state", lambda x: x.state[0], ("state has shape", "slots, heads")),
    "state turned": ("decode verify commit", "state", lambda x: x.state.mT, ("state has shape", "40, 24]")),
    "state dtype": ("decode verify commit", "state", lambda x: x.state.half(), ("float16", "float32 or bfloat16")),
    "state double": ("decode verify commit", "state", lambda x: x.state.double(), ("float64", "float32 or bfloat16")),
    "slope": ("verify commit", "slope", lambda x: x.slope[:1], ("slope has shape [1]", "[2] or [5, 2]")),
    "slope dtype": ("verify commit", "slope", lambda x: x.slope.double(), ("slope.dtype is float64", "float32")),
    "indices": ("verify commit", "state_indices", lambda x: x.index([0]), ("state_indices has shape [1]", "[5]")),
    "index dtype": ("verify commit", "state_indices", lambda x: x.index(SLOTS).float(), ("float32", "int32 or int64")),
    "no indices": ("verify commit", "state_indices", lambda x: None, ("state.shape[0] is 9", "state_indices")),
    "accepted": ("commit", "num_accepted", lambda x: x.index([1, 2]), ("num_accepted has shape [2]", "[5]")),
    "accepted dtype": ("commit", "num_accepted", lambda x: x.index(ACCEPTED).bool(), ("num_accepted.dtype", "int64")),
}


def named_arguments(x, operator):
    args, options = arguments(x, operator)
    names = [a.name for a in getattr(la2, operator).default._schema.arguments]
    return dict(zip(names, args, strict=False)) | options


@pytest.mark.parametrize(
    "operator, name", [(operator, name) for name in REFUSED for operator in REFUSED[name][0].split()]
)
def test_refuses(device, operator, name):
    x = Problem(device, 3)
    _, argument, change, words = REFUSED[name]
    named = named_arguments(x, operator)
    named[argument] = change(x)
    before = x.state.clone()
    with pytest.raises(RuntimeError) as error:
        getattr(la2, operator)(**named)
    text = str(error.value)
    assert text.startswith(f"la2::{operator}: ")
    assert all(word in text for word in words), text
    assert torch.equal(bits(x.state), bits(before))


@pytest.mark.parametrize("operator", ("verify", "commit"))
@pytest.mark.parametrize("tokens", (0, MOST + 1))
def test_refuses_too_many_tokens(device, operator, tokens):
    x = Problem(device, tokens)
    with pytest.raises(RuntimeError, match=rf"la2::{operator}: k.shape\[1\] is {tokens}, expected 1 to 16 tokens"):
        getattr(la2, operator)(**named_arguments(x, operator))


@pytest.mark.parametrize("operator", OPERATORS)
def test_refuses_a_bfloat16_pool_of_float64(device, operator):
    x = Problem(device, 2, dtype=FP64, pool_dtype=BF16)
    with pytest.raises(RuntimeError, match=f"la2::{operator}: state.dtype is bfloat16, expected float64"):
        getattr(la2, operator)(**named_arguments(x, operator))


@pytest.mark.parametrize("operator", OPERATORS)
def test_refuses_slots_that_are_not_there(operator):
    for index_dtype in INDEX_DTYPES:
        x = Problem("cpu", 2, index_dtype=index_dtype)
        before, named = x.state.clone(), named_arguments(x, operator)
        named["state_indices"] = x.index([0, 1, 9, 2, 3])
        with pytest.raises(RuntimeError, match=rf"la2::{operator}: state_indices\[2\] is 9, .* 9 slots"):
            getattr(la2, operator)(**named)
        assert torch.equal(bits(x.state), bits(before))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (BF16, FP32))
@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
@pytest.mark.parametrize("pool", POOLS)
def test_graph(dtype, pool_dtype, pool):
    """Captured once, replayed with other tokens, slots and counts."""
    x = Problem("cuda", 8, dtype=dtype, pool_dtype=pool_dtype, pool=pool, dims=(128, 128))
    x.state.nan_to_num_()
    state, twin = x.copy(), x.copy()
    slots, accepted = x.index([-1] * 5), x.index([0] * 5)

    def step(state):
        out = la2.verify(x.q, x.k, x.v, state, x.slope, state_indices=slots)
        la2.commit(x.k, x.v, state, accepted, x.slope, state_indices=slots)
        return out, la2.decode(x.q[:, 0], x.k[:, 0], x.v[:, 0], state, x.slope, state_indices=slots)

    step(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(state)
    replays = (
        ((6, 2, -1, 0, 7), (2, 0, 3, 99, -4)),
        ((1, 3, 5, 8, 4), (8, 7, 1, 0, 4)),
        ((-1, 0, -1, -1, 2), (1, 8, 1, 1, 5)),
    )
    for seed, (new_slots, counts) in enumerate(replays):
        torch.manual_seed(seed)
        for t in (x.inputs.q, x.inputs.k, x.inputs.v):
            t.normal_()
        slots.copy_(x.index(new_slots))
        accepted.copy_(x.index(counts))
        before = twin.clone()
        graph.replay()
        for got, want in zip(captured, step(twin), strict=True):
            assert torch.equal(got, want) and got.any()
        assert torch.equal(state, twin) and not torch.equal(state, before)


@pytest.mark.gpu
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("pool", POOLS)
def test_slots_outside_of_the_pool_are_padding(index_dtype, pool):
    """On a GPU nobody can look at them in time."""
    far = torch.iinfo(index_dtype)
    x = Problem("cuda", 4, slots=(4, 9, far.max, -1, 0), pool=pool, index_dtype=index_dtype)
    x.state.nan_to_num_()
    before, state = x.copy(), x.copy()
    out = x.verify(state)
    assert not out[1:4].any() and out[0].any() and out[4].any()
    x.commit(state, [2, 2, 2, 2, 2])
    assert torch.equal(x.decode(x.copy(), 0), out[:, 0])
    check_others(state, before, [4, 0])
    assert not torch.equal(state[4], before[4]) and not torch.equal(state[0], before[0])
