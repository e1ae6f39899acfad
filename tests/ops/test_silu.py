"""SiLU of q, k and v within the operators: forward_silu, decode and extend are what they are on tensors that torch's
SiLU made, but for the last place of few of those (both round once from float32)."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.ops.test_recurrent import Problem as Rows
from tests.support.cases import Case
from tests.support.gpu import BF16, FP16, FP32, FP64, HALVES, assert_equal, needs_hopper, plan_id
from tests.support.pools import bits
from tests.support.requests import Problem as Requests
from tests.support.tolerance import check_forward

la2 = torch.ops.la2
NAMES = ("q", "k", "v")
ALL = 7
SMALL = {"heads": 2, "key_dim": 40, "value_dim": 24}
KINDS = {
    "dense": Case(batch=2, length=130, scale=0.5, **SMALL),
    "bnhd": Case(batch=2, length=67, layout="bnhd", state_layout="vk", slope="mixed", **SMALL),
    "qkv": Case(batch=2, length=100, layout="qkv", state_layout=None, **SMALL | {"value_dim": 40}),
    "packed": Case(lengths=(67, 0, 1, 63), slope_per_seq=True, **SMALL),
    "one": Case(batch=2, length=1, **SMALL),
    "turned": Case(batch=2, length=5, layout="turned", **SMALL),
}


def activated(x, silu):
    """The problem that is left once torch has taken SiLU of the operands that `silu` names."""
    return x.replace(**{n: F.silu(getattr(x, n)) for i, n in enumerate(NAMES) if silu >> i & 1})


def forward_silu(x, silu=ALL):
    return la2.forward_silu(*x.args, **x.options, silu=silu)


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16, FP64), ids=plan_id)
@pytest.mark.parametrize("kind", KINDS)
def test_values(device, dtype, kind):
    x = dataclasses.replace(KINDS[kind], dtype=dtype).make(device)
    check_forward(activated(x, ALL), *forward_silu(x))


@pytest.mark.parametrize("silu", range(8))
def test_each_operand(device, silu):
    x = Case(batch=2, length=130, dtype=BF16, **SMALL | {"value_dim": 40}).make(device)
    out, state = forward_silu(x, silu)
    check_forward(activated(x, silu), out, state)
    wrong = la2.forward_with_state(*activated(x, silu ^ 1).args, **x.options)[0]
    assert (out - wrong).norm() > 0.1 * out.norm()  # that of another operand would be noticed


def test_none_is_forward_with_state(device):
    x = KINDS["dense"].make(device)
    assert_equal(forward_silu(x, 0), la2.forward_with_state(*x.args, **x.options))


def test_without_the_state(device):
    x = KINDS["packed"].make(device)
    out, state = la2.forward_silu(*x.args, **x.options, need_state=False)
    assert torch.equal(out, forward_silu(x)[0]) and state.shape == (0,) and state.dtype == FP32
    q = x.q.detach().clone().requires_grad_()
    out, state = la2.forward_silu(q, *x.args[1:], **x.options, need_state=False)
    assert state.shape == (0,) and torch.autograd.grad(out, q, x.grad_out)[0].abs().sum() > 0
    mapped = torch.func.vmap(lambda q: la2.forward_silu(q, *x.args[1:], **x.options, need_state=False)[0])(x.q[None])
    assert (mapped[0] - out).norm() <= 1e-6 * out.norm()


@pytest.mark.parametrize("silu", (0, ALL))
def test_heads_that_share_their_rows(device, silu):
    """Operands with a stride of 0, which SiLU makes whole."""
    x = KINDS["dense"].make(device)
    x.q, x.k, x.v = (t[:, :1].expand(-1, t.shape[1], -1, -1) for t in (x.q, x.k, x.v))
    out, state = forward_silu(x, silu)
    check_forward(activated(x, silu), out, state)
    options = x.options | {"silu": silu}
    torch.library.opcheck(la2.forward_silu.default, x.args, options, test_utils=("test_schema", "test_faketensor"))


def test_far_values(device):
    """From where e^-x is infinite to where it is zero, and zeros."""
    x = Case(batch=1, length=64, dtype=BF16, **SMALL).make(device)
    x.v = torch.linspace(-200, 200, x.v.numel(), device=device).view(x.v.shape).to(BF16)
    x.k[:, :, ::3] = 0
    x.q[:, :, 0] = -1e30
    check_forward(activated(x, ALL), *forward_silu(x))


@pytest.mark.parametrize("silu", (ALL, 5))
def test_gradients_are_those_of_both(device, silu):
    x = KINDS["packed"].make(device)

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in (*x.args, x.initial_state)]
        options = x.options | {"initial_state": leaves[4]}
        values = function(leaves[:3], leaves[3], options)
        return torch.autograd.grad(values, leaves, x.grads)

    got = gradients(lambda rows, slope, options: la2.forward_silu(*rows, slope, **options, silu=silu))
    want = gradients(
        lambda rows, slope, options: la2.forward_with_state(
            *(F.silu(t) if silu >> i & 1 else t for i, t in enumerate(rows)), slope, **options
        )
    )
    assert_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(device, kind):
    x = KINDS[kind].make(device)
    args = tuple(t.detach().requires_grad_() for t in x.args)
    torch.library.opcheck(la2.forward_silu.default, args, x.options | {"silu": 5})


def test_compiles_whole(device):
    torch.compiler.reset()
    x = KINDS["dense"].make(device)
    compiled = torch.compile(lambda q, k, v, s: la2.forward_silu(q * 2, k, v, s)[0] + 1, fullgraph=True)
    with torch.no_grad():
        got = compiled(*x.args)
    want = la2.forward_silu(x.q * 2, *x.args[1:])[0] + 1
    assert (got - want).norm() <= 1e-6 * want.norm()
    torch.compiler.reset()


def test_vmap(device):
    x = KINDS["dense"].make(device)
    q = torch.stack([x.q, 2 * x.q])
    got = torch.func.vmap(lambda q: la2.forward_silu(q, x.k, x.v, x.slope, silu=3))(q)
    for i in range(2):
        want = la2.forward_silu(q[i], x.k, x.v, x.slope, silu=3)
        for a, b in zip(got, want, strict=True):
            assert (a[i] - b).norm() <= 1e-6 * b.norm()


def test_autocast(device):
    x = KINDS["dense"].make(device)
    with torch.autocast(device, dtype=BF16):
        out, _ = la2.forward_silu(*x.args)
    assert torch.equal(out, la2.forward_silu(*(t.to(BF16) for t in x.args[:3]), x.slope)[0])


@pytest.mark.parametrize("silu", (-1, 8))
def test_refuses_other_bits(device, silu):
    x, rows, requests = KINDS["one"].make(device), Rows(device, 1), Requests(device, (3,))
    tokens = [t[:, 0] for t in (rows.q, rows.k, rows.v)]
    calls = {
        "forward_silu": lambda: forward_silu(x, silu),
        "decode": lambda: la2.decode(*tokens, rows.state[: len(rows.slots)], rows.slope, silu=silu),
        "extend": lambda: la2.extend(requests.q, requests.k, requests.v, requests.state, requests.index(requests.ends),
                                     requests.slope, silu=silu),
    }  # fmt: skip
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"la2::{name}: silu is {silu}, expected .* 0 to 7"):
            call()


# ---- on pools of states


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16, FP64), ids=plan_id)
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
@pytest.mark.parametrize("silu", (ALL, 1, 2, 4))
@pytest.mark.parametrize("dims", ((40, 24), (128, 128), (256, 136)), ids=plan_id)
def test_decode(device, dtype, pool, silu, dims):
    x = Rows(device, 1, dims=dims, dtype=dtype, pool=pool)
    rows = [t[:, 0] for t in (x.q, x.k, x.v)]
    options = {"state_indices": x.index(x.slots), "scale": x.scale}
    state, other = x.copy(), x.copy()
    got = la2.decode(*rows, state, x.slope, silu=silu, **options)
    own = [F.silu(t) if silu >> i & 1 else t for i, t in enumerate(rows)]
    want = la2.decode(*own, other, x.slope, **options)
    eps = torch.finfo(dtype).eps
    for a, b in ((got, want), (state[x.index([6, 2, 0, 7]).long()], other[x.index([6, 2, 0, 7]).long()])):
        assert (a.double() - b.double()).norm() <= eps * b.double().norm()
    kept = x.index([1, 3, 4, 5, 8]).long()
    assert torch.equal(bits(state[kept]), bits(x.state[kept]))
    if silu == ALL and dtype == BF16:  # that of other operands would be noticed
        plain = la2.decode(*rows, x.copy(), x.slope, **options)
        assert (got - plain).norm() > 0.1 * got.norm()


LENGTHS = (0, 1, 2, 63, 1, 65, 300)


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=plan_id)
@pytest.mark.parametrize("dims", ((40, 24), (128, 128), (256, 64)), ids=plan_id)
@pytest.mark.parametrize("plan", ("", "segments=3"))
def test_extend(device, monkeypatch, dtype, dims, plan):
    """Requests of one token and of many, snapshots, rows of nobody."""
    if plan:
        monkeypatch.setenv("LA2_PLAN", plan)
    snapshots = [[], [], [(1, 10)], [(63, 11), (7, 12)], [], [(64, 13)], [(0, 14)]]
    x = Requests(device, LENGTHS, snapshots=snapshots, tail=3, dims=dims, dtype=dtype, fresh=(2,))
    state, other = x.state.clone(), x.state.clone()
    out = la2.extend(x.q, x.k, x.v, state, x.index(x.ends), x.slope, silu=ALL, **x.options)
    x.q, x.k, x.v = (F.silu(t) for t in (x.q, x.k, x.v))
    want = x.run(other)
    for got, near in ((out, want), (state, other)):
        assert (got.double() - near.double()).norm() <= torch.finfo(dtype).eps * near.double().norm()
    assert not out[-3:].any()


# ---- Hopper's kernels, which take it of tiles in shared memory


def check_plan(monkeypatch, case, plan, silu=ALL):
    monkeypatch.setenv("LA2_PLAN", plan)
    x = case.make("cuda")
    got = forward_silu(x, silu)
    check_forward(activated(x, silu), *got)
    assert_equal(forward_silu(x, silu), got)
    return x, got


HOPPER = ("segments=1", "slice=64,segments=1", "slice=64,segments=3",
          "slice=128,segments=2", "slice=64,segments=2,pieces=2")  # fmt: skip
LONG = {
    "dense": Case(heads=3, batch=2, length=1100, key_dim=128, value_dim=128, state_layout="vk"),
    "qkv": Case(heads=3, batch=2, length=700, key_dim=128, value_dim=128, layout="qkv", slope="mixed"),
    "packed": Case(heads=3, lengths=(513, 0, 1, 64, 129, 300), key_dim=128, value_dim=128, layout="bnhd"),
}


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=plan_id)
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("plan", HOPPER)
def test_hopper_plans(monkeypatch, dtype, kind, plan):
    check_plan(monkeypatch, dataclasses.replace(LONG[kind], dtype=dtype), f"family=sm90,{plan}")


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    "dims", ((64, 64), (64, 128), (128, 64), (96, 72), (192, 192), (256, 256), (128, 256)), ids=plan_id
)
@pytest.mark.parametrize("segments", (1, 2))
@pytest.mark.parametrize("silu", (ALL, 1, 2, 4))
def test_hopper_dims(monkeypatch, dims, segments, silu):
    """256 among them, where SiLU is torch's."""
    case = Case(heads=2, batch=2, length=333, key_dim=dims[0], value_dim=dims[1], dtype=BF16)
    family = "family=sm90," if dims[0] <= 192 else ""
    check_plan(monkeypatch, case, f"{family}segments={segments}", silu)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("dense", "packed"))
@pytest.mark.parametrize("value_dim", (128, 256))
@pytest.mark.parametrize("segments", (1, 2))
@pytest.mark.parametrize("dtype", HALVES, ids=plan_id)
def test_hopper_slices(monkeypatch, kind, value_dim, segments, dtype):
    """Blocks with slices of the same head each take SiLU of all of q and k."""
    case = dataclasses.replace(LONG[kind], dtype=dtype, value_dim=value_dim)
    check_plan(monkeypatch, case, f"family=sm90,slice=64,segments={segments}")


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("dense", "packed"))
def test_hopper_tile_of_192_in_float16(monkeypatch, kind):
    case = dataclasses.replace(LONG[kind], dtype=FP16, key_dim=192, value_dim=136)
    check_plan(monkeypatch, case, "family=sm90,segments=2")


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("heads", (2, 64))
@pytest.mark.parametrize("dtype", HALVES, ids=plan_id)
def test_hopper_extend(dtype, heads):
    lengths = (1, 700, 0, 64, 2, 65, 1500)
    snapshots = [[]] * 6 + [[(100, 8), (1500, 9)]]
    x = Requests("cuda", lengths, snapshots=snapshots, dims=(128, 128), dtype=dtype, heads=heads, slope="usual")
    before = x.state.clone()
    out = la2.extend(x.q, x.k, x.v, x.state, x.index(x.ends), x.slope, silu=ALL, **x.options)
    x.q, x.k, x.v = (F.silu(t) for t in (x.q, x.k, x.v))
    x.check(out, before, x.state)


@needs_hopper
@pytest.mark.gpu
def test_hopper_takes_no_memory_for_it(monkeypatch):
    """No activated copies: nothing is allocated but the results."""
    monkeypatch.setenv("LA2_PLAN", "family=sm90,slice=64,segments=1")
    x = Case(heads=8, length=4096, key_dim=128, value_dim=128, dtype=BF16, state_layout=None).make("cuda")
    peak = {}
    for name, call in (("with", lambda: forward_silu(x)), ("without", lambda: la2.forward_with_state(*x.args))):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
        call()
        peak[name] = torch.cuda.max_memory_allocated() - begin
    assert peak["with"] == peak["without"]


@pytest.mark.gpu
def test_gradients_on_a_gpu_follow():
    """Trained through it, and the plain operators beside it."""
    x = Case(heads=4, length=300, key_dim=64, value_dim=64, dtype=BF16, state_layout=None).make("cuda")
    leaves = [t.detach().clone().requires_grad_() for t in x.args[:3]]
    out, _ = la2.forward_silu(*leaves, x.slope)
    got = torch.autograd.grad(out, leaves, x.grad_out)
    y = activated(x, ALL)
    gradients = la2.backward(x.grad_out, None, *y.args, need_dslope=False)[:3]
    for leaf, name, gradient, a in zip(leaves, NAMES, gradients, got, strict=True):
        want = torch.ops.aten.silu_backward(gradient, leaf.detach())
        assert torch.equal(a, want), name
