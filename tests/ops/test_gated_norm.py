"""decode_gated_norm: decode's states to the bit, and RMSNorm and gate of decode's rows with one rounding."""

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from lightning_attn2_ext.bench.calibrate import kernel_times
from tests.ops.test_recurrent import Problem
from tests.support.gpu import BF16, FP16, FP32, FP64, assert_equal, plan_id

la2 = torch.ops.la2
EPS = 1e-5
SHAPES = {"narrow": (2, (40, 24)), "odd": (5, (16, 72)), "wide": (64, (8, 128)), "wider than a block": (72, (8, 256))}


def problem(device, shape="narrow", dtype=FP32, **options):
    heads, dims = SHAPES[shape]
    return Problem(device, 1, heads=heads, dims=dims, dtype=dtype, **options)


def gate_and_weight(x, seed=3):
    generator = torch.Generator(x.device).manual_seed(seed)
    width = x.v.shape[2] * x.v.shape[3]
    gate = 4 * torch.randn(len(x.slots), width, generator=generator, device=x.device)
    weight = torch.randn(width, generator=generator, device=x.device)
    return gate.to(x.q.dtype), weight.to(x.q.dtype)


def arguments(x, state, slots=None):
    rows = (t[:, 0] for t in (x.q, x.k, x.v))
    return (*rows, state), {"state_indices": x.index(x.slots) if slots is None else slots, "scale": x.scale}


def call(x, state, gate, weight, slots=None, **options):
    rows, own = arguments(x, state, slots)
    return la2.decode_gated_norm(*rows, gate, weight, x.slope, **own | {"eps": EPS} | options)


def decode(x, state, **options):
    rows, own = arguments(x, state)
    return la2.decode(*rows, x.slope, **own, **options)


def normed(rows, gate, weight):
    """In float64, of what decode rounded."""
    rows, gate, weight = (t.double() for t in (rows.flatten(1), gate, weight))
    return gate.sigmoid() * rows * (rows.square().mean(1, keepdim=True) + EPS).rsqrt() * weight


def check_rounded_once(got, want, dtype):
    info = torch.finfo(dtype)
    # Where dtype has the digits of the arithmetic, that rounds several times: exp and root by up to two units each, the
    # mean, the quotient and three products by one or so. Twice the ten of that.
    rounding = 0.51 * info.eps if dtype in (BF16, FP16) else 20 * info.eps
    assert ((got.double() - want).abs() <= rounding * want.abs() + info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16, FP64), ids=plan_id)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silu", (0, 7))
def test_values(device, dtype, shape, silu):
    x = problem(device, shape, dtype)
    gate, weight = gate_and_weight(x)
    state, twin = x.copy(), x.copy()
    got = call(x, state, gate, weight, silu=silu)
    rows = decode(x, twin, silu=silu)
    assert got.shape == gate.shape and got.dtype == dtype and got.is_contiguous()
    check_rounded_once(got, normed(rows, gate, weight), dtype)
    assert got[x.live].any() and not got[[row for row in range(len(x.slots)) if row not in x.live]].any()
    assert torch.equal(state.nan_to_num(7), twin.nan_to_num(7))


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=plan_id)
def test_bits_of_a_row_are_its_own(device, dtype):
    x = problem(device, "wide", dtype)
    gate, weight = gate_and_weight(x)
    whole = call(x, x.copy(), gate, weight)
    rows, own = arguments(x, x.copy())
    for i in x.live:
        one = [t[i : i + 1] for t in rows[:3]]
        own["state_indices"] = x.index(x.slots[i : i + 1])
        assert torch.equal(
            la2.decode_gated_norm(*one, rows[3], gate[i : i + 1], weight, x.slope, **own, eps=EPS), whole[i : i + 1]
        )


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=plan_id)
def test_rows_as_they_come(device, dtype):
    """Gates of a larger projection, at addresses that no vector access fits, and weights such."""
    x = problem(device, dtype=dtype)
    gate, weight = gate_and_weight(x)
    want = call(x, x.copy(), gate, weight)
    inside = torch.full((len(gate), gate.shape[1] + 24), 9.0, dtype=dtype, device=device)
    for first in (8, 3):
        part = inside[:, first : first + gate.shape[1]].copy_(gate)
        shifted = torch.cat([weight[:1], weight])[1:]
        assert torch.equal(call(x, x.copy(), part, shifted), want)
    assert torch.equal(call(x, x.copy(), gate.t().contiguous().t(), weight), want)


def test_gates_at_the_ends(device):
    x = problem(device, "wide")
    gate, weight = gate_and_weight(x)
    gate[0, :4] = torch.tensor([-1e4, 1e4, -float("inf"), float("inf")])
    rows = decode(x, x.copy())
    got, want = call(x, x.copy(), gate, weight), normed(rows, gate, weight)
    check_rounded_once(got, want, FP32)
    assert not got[0, [0, 2]].any() and got[0, [1, 3]].all()
    gate[1, 5] = float("nan")
    got = call(x, x.copy(), gate, weight)
    assert got[1, 5].isnan() and got.isnan().sum() == 1


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=plan_id)
def test_opcheck(device, dtype):
    x = problem(device, dtype=dtype)
    gate, weight = gate_and_weight(x)
    rows, options = arguments(x, torch.randn_like(x.state))
    torch.library.opcheck(la2.decode_gated_norm.default, (*rows, gate, weight, x.slope), options | {"silu": 5})


def test_no_rows(device):
    rows, none = torch.zeros(0, 2, 16, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    state, weight = torch.ones(3, 2, 16, 16, device=device), torch.ones(32, device=device)
    out = la2.decode_gated_norm(rows, rows, rows, state, rows.flatten(1), weight, state_indices=none)
    assert out.shape == (0, 32) and (state == 1).all()


WRONG = {
    "gate of other rows": (lambda g, w: (g[1:], w), {}, r"gate has shape \[4, 48\], expected \[5, 48\]"),
    "gate in heads": (lambda g, w: (g.unflatten(1, (2, 24)), w), {}, r"gate has shape \[5, 2, 24\]"),
    "gate in double": (lambda g, w: (g.double(), w), {}, r"gate\.dtype is float64, expected float32 as for q"),
    "weight of a head": (lambda g, w: (g, w[:24]), {}, r"weight has shape \[24\], expected \[48\]"),
    "weight in half": (lambda g, w: (g, w.half()), {}, r"weight\.dtype is float16, expected float32"),
    "eps": (lambda g, w: (g, w), {"eps": -1.0}, "eps is -1, expected at least 1.17549e-38"),
    "no eps": (lambda g, w: (g, w), {"eps": 0.0}, "eps is 0, expected at least"),
    "silu": (lambda g, w: (g, w), {"silu": 8}, "silu is 8, expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(device, name):
    change, options, message = WRONG[name]
    x = problem(device)
    state = x.copy()
    rows, own = arguments(x, state)
    with pytest.raises(RuntimeError, match="la2::decode_gated_norm: " + message):
        la2.decode_gated_norm(*rows, *change(*gate_and_weight(x)), x.slope, **own | options)
    assert torch.equal(state.nan_to_num(7), x.state.nan_to_num(7))


@pytest.mark.gpu
@pytest.mark.parametrize("which", (0, 1))
def test_refuses_mixed_devices(which):
    x = problem("cuda")
    given = list(gate_and_weight(x))
    given[which] = given[which].cpu()
    with pytest.raises(RuntimeError, match=f"{('gate', 'weight')[which]} is on cpu, expected cuda"):
        call(x, x.copy(), *given)


@pytest.mark.parametrize("name", ("q", "state", "gate", "weight", "slope"))
def test_refuses_to_differentiate(device, name):
    x = problem(device)
    gate, weight = gate_and_weight(x)
    (q, k, v, state), own = arguments(x, x.copy())
    given = {"q": q, "k": k, "v": v, "state": state, "gate": gate, "weight": weight, "slope": x.slope}
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"la2::decode_gated_norm: {name} requires grad"):
        la2.decode_gated_norm(*given.values(), **own)
    if name != "state":
        with torch.no_grad():
            la2.decode_gated_norm(*given.values(), **own)


def test_autocast(device):
    x = problem(device)
    gate, weight = gate_and_weight(x)
    rows, own = arguments(x, x.copy())
    with torch.autocast(device, BF16):
        got = call(x, x.copy(), gate, weight)
    narrow = [t.to(BF16) for t in (*rows[:3], gate, weight)]
    want = la2.decode_gated_norm(*narrow[:3], x.copy(), *narrow[3:], x.slope, **own, eps=EPS)
    assert got.dtype == BF16 and torch.equal(got, want)


def test_vmap_is_refused(device):
    x = problem(device)
    gate, weight = gate_and_weight(x)
    state = x.copy()
    with pytest.raises(NotImplementedError, match="la2::decode_gated_norm: an argument is mapped"):
        torch.vmap(lambda g: call(x, state, g, weight))(torch.stack([gate, gate]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=plan_id)
def test_what_was_made_just_before(dtype):
    """The norm starts while decode is at work: on a gate, a weight and rows of the kernels right before, and the next
    call's right behind it, also in a graph."""
    x = problem("cuda", "wide", dtype, slots=tuple(range(12)), num_slots=12)
    gates = torch.stack([gate_and_weight(x, seed)[0] for seed in range(8)])
    _, weight = gate_and_weight(x)
    want_state, want = x.copy(), []
    for gate in gates:
        rows = decode(x, want_state)
        want.append(normed(rows, gate * 2, weight + 1))
    other, scratch = torch.empty_like(gates[0]), torch.empty_like(weight)
    slots = x.index(x.slots)
    results = torch.empty_like(gates)

    def steps(state):
        for i, gate in enumerate(gates):
            torch.add(weight, 1, out=scratch)
            torch.mul(gate, 2, out=other)
            results[i] = call(x, state, other, scratch, slots)
            other.fill_(float("nan"))
            scratch.fill_(float("nan"))

    def check(state):
        for got, exact in zip(results, want, strict=True):
            check_rounded_once(got, exact, dtype)
        assert torch.equal(state, want_state)
        results.fill_(float("nan"))

    for _ in range(20):
        state = x.copy()
        steps(state)
        check(state)
    state = x.copy()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps(state)
    for _ in range(5):
        state.copy_(x.state)
        graph.replay()
        check(state)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
@pytest.mark.parametrize("pool_dtype", (FP32, BF16), ids=plan_id)
@pytest.mark.parametrize("dims", ((128, 128), (64, 72), (256, 40)), ids=str)
def test_bits_of_many_states(pool, pool_dtype, dims):
    """Decode asks for states ahead where there are more than L2 holds: the bits are those of a few at a time."""
    heads = 16
    rows = -(-(80 << 20) // (heads * dims[0] * dims[1] * pool_dtype.itemsize))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    slots = tuple(-1 if i % 7 == 3 else s for i, s in enumerate(order))
    x = Problem("cuda", 1, heads=heads, dims=dims, dtype=BF16, pool=pool, pool_dtype=pool_dtype, slots=slots,
                num_slots=rows)  # fmt: skip
    many, few = x.copy(), x.copy()
    got = decode(x, many)
    tokens, _ = arguments(x, few)
    for first in range(0, rows, 16):
        part = slice(first, first + 16)
        want = la2.decode(*(t[part] for t in tokens[:3]), few, x.slope, state_indices=x.index(slots[part]), scale=0.5)
        assert_equal([got[part]], [want])
    assert torch.equal(many.nan_to_num(7), few.nan_to_num(7))
    if pool == "vk":  # whose blocks are alike however many there are: it was another kernel that asks
        indices = [x.index(slots[:n]) for n in (rows, rows // 2)]

        def names(which):
            part = [t[: len(which)] for t in tokens[:3]]
            return set(kernel_times(lambda: la2.decode(*part, few, x.slope, state_indices=which, scale=0.5), 1))

        assert names(indices[0]).isdisjoint(names(indices[1]))
