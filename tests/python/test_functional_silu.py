"""`activated` of the documented functions: what `F.silu` before them gives, in value and in gradient."""

import pytest
import torch
from torch.nn import functional as F

from lightning_attn2_ext import extend, lightning_attention, lightning_attention_decode, slopes, testing
from tests.support.dispatched import Dispatched

HEADS, D, E = 3, 16, 24
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LETTERS = ["q", "k", "v", "qk", "vkq"]
#: Of the sum of |terms|, in units of eps: each of three operands one ulp apart, what enters a product and the state's
#: operand rounded apart, the result rounded, and the order of sums.
ULPS = 8

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def qkv(dtype, device="cpu", batch=2, length=70):
    return tuple(
        normal(batch, HEADS, length, dim, seed=i, dtype=dtype, device=device) for i, dim in enumerate((D, D, E))
    )


def slope_of(dtype, device="cpu"):
    return slopes.minimax(HEADS).to(device, testing.accumulation_dtype(dtype))


def silu_before(q, k, v, letters):
    return tuple(F.silu(x) if p in letters else x for p, x in zip("qkv", (q, k, v)))


def terms(q, k, v, slope, **options):
    """The sums of the magnitudes whose signed sums out and final state are."""
    state = options.pop("initial_state", None)
    state = None if state is None else state.abs().double()
    q, k, v = (x.double().abs() for x in (q, k, v))
    return testing.recurrence(q, k, v, slope.double(), initial_state=state, **options)


def assert_near(got, want, magnitude, dtype):
    assert got.shape == want.shape and got.dtype == want.dtype
    eps = torch.finfo(dtype).eps
    assert ((got.double() - want.double()).abs() <= ULPS * eps * magnitude.to(got.device)).all()
    assert want.abs().max() > 0


CASES = {
    "plain": {},
    "initial_state": {"initial_state": 2, "scale": 0.25},
    "packed": {"cu_seqlens": (0, 33, 33, 70), "initial_state": 3},
}


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("case", CASES)
@dtypes
def test_values(device, dtype, case, letters):
    options = dict(CASES[case])
    q, k, v = qkv(dtype, device, batch=1 if "cu_seqlens" in options else 2)
    slope, accumulation = slope_of(dtype, device), testing.accumulation_dtype(dtype)
    if "initial_state" in options:
        options["initial_state"] = normal(options["initial_state"], HEADS, D, E, seed=4, dtype=accumulation).to(device)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], device=device)
    before = silu_before(q, k, v, letters)
    want, want_state = lightning_attention(*before, slope, return_final_state=True, **options)
    out_terms, state_terms = terms(*before, slope, **options)

    got, got_state = lightning_attention(q, k, v, slope, return_final_state=True, activated=letters, **options)
    assert_near(got, want, out_terms, dtype)
    assert_near(got_state, want_state, state_terms, dtype)
    alone = lightning_attention(q, k, v, slope, activated=letters, **options)
    assert torch.equal(alone, got)
    rows = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    turned = lightning_attention(*rows, slope, layout="bnhd", activated=letters, **options)
    assert_near(turned.transpose(1, 2), want, out_terms, dtype)


@pytest.mark.parametrize("letters", ["", "q", "vkq"])
@dtypes
def test_gradients(dtype, letters):
    """Of out and final state, by everything; and with a gradient the values stay."""
    slope, accumulation = slope_of(dtype), testing.accumulation_dtype(dtype)
    inputs = [*qkv(dtype), slope, normal(2, HEADS, D, E, seed=4, dtype=accumulation)]
    leaves = [x.requires_grad_() for x in inputs]
    q, k, v, slope, state = leaves
    weights = normal(2, HEADS, 70, E, seed=5, dtype=dtype), normal(2, HEADS, D, E, seed=6, dtype=accumulation)
    options = {"initial_state": state, "return_final_state": True}
    results = {
        "inside": lightning_attention(q, k, v, slope, activated=letters, **options),
        "before": lightning_attention(*silu_before(q, k, v, letters), slope, **options),
    }
    grads = {name: torch.autograd.grad(y, leaves, weights) for name, y in results.items()}
    eps = torch.finfo(dtype).eps
    for a, b in zip(results["inside"] + grads["inside"], results["before"] + grads["before"], strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= ULPS * eps * b.norm() and b.norm() > 0
    with torch.no_grad():
        values = lightning_attention(q, k, v, slope, activated=letters, **options)
    for a, b in zip(values, results["inside"], strict=True):
        assert (a - b).norm() <= ULPS * eps * b.norm()


def test_second_derivatives():
    q, k, v = (x[:1, :2, :3, :8].clone().requires_grad_() for x in qkv(torch.float64))
    slope = slopes.minimax(2).double().requires_grad_()

    def function(q, k, v, slope):
        return lightning_attention(q, k, v, slope, return_final_state=True, activated="qkv")

    torch.autograd.gradcheck(function, (q, k, v, slope), fast_mode=True)
    torch.autograd.gradgradcheck(function, (q, k, v, slope), fast_mode=True)


POOLS = [(dtype, testing.accumulation_dtype(dtype)) for dtype in DTYPES]
POOLS += [(dtype, torch.bfloat16) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("dtype, pool_dtype", POOLS, ids=lambda d: str(d).removeprefix("torch."))
def test_decode(device, dtype, pool_dtype, letters):
    q, k, v = (x[:, :, 0] for x in qkv(dtype, device, batch=4, length=1))
    pool = normal(6, HEADS, D, E, seed=4, device=device).to(pool_dtype)
    slope, slots = slope_of(dtype, device), torch.tensor([5, -1, 0, 2], device=device)
    own, options = pool.clone(), {"state_indices": slots, "scale": 0.5}
    before = silu_before(q, k, v, letters)
    want = lightning_attention_decode(*before, pool, slope, **options)
    original = own.clone()
    got = lightning_attention_decode(q, k, v, own, slope, activated=letters, **options)
    rows = [0, 2, 3]
    magnitudes = terms(*(x[rows][:, :, None] for x in before), slope, initial_state=original[slots[rows]], scale=0.5)
    narrowest = max(dtype, pool_dtype, key=lambda d: torch.finfo(d).eps)
    assert_near(got[rows], want[rows], magnitudes[0].squeeze(2), dtype)
    assert_near(own[slots[rows]], pool[slots[rows]], magnitudes[1], narrowest)
    assert not got[1].any() and torch.equal(own[[1, 3, 4]], original[[1, 3, 4]])


@torch.no_grad()
def test_nothing_is_activated_before_the_operator():
    q, k, v = qkv(torch.float32)
    with Dispatched() as seen:
        lightning_attention(q, k, v, activated="vq")
        lightning_attention_decode(q[:, :, 0], k[:, :, 0], v[:, :, 0], torch.zeros(2, HEADS, D, E), activated="k")
    assert [(name, given["silu"]) for name, given in seen.calls if name.startswith("la2.")] == [
        ("la2.forward_silu", 5),
        ("la2.decode", 2),
    ]
    assert not seen.of("aten.silu")


@torch.no_grad()
def test_without_letters_the_operators_are_the_plain_ones():
    q, k, v = qkv(torch.float32)
    for more, name in (({}, "la2.forward"), ({"return_final_state": True}, "la2.forward_with_state")):
        with Dispatched() as seen:
            lightning_attention(q, k, v, **more)
        assert [called for called, _ in seen.calls] == [name]
    with Dispatched() as seen:
        lightning_attention_decode(q[:, :, 0], k[:, :, 0], v[:, :, 0], torch.zeros(2, HEADS, D, E))
    assert seen.of("la2.decode")[0]["silu"] == 0


@pytest.mark.parametrize("letters", ["o", "qx", "q k", "QK", "silu"])
def test_other_letters(letters):
    q, k, v = qkv(torch.float32)
    message = f"activated is {letters!r}, expected letters of 'qkv'"
    with pytest.raises(ValueError, match=f"lightning_attention: {message}"):
        lightning_attention(q, k, v, activated=letters)
    with pytest.raises(ValueError, match=f"lightning_attention_decode: {message}"):
        lightning_attention_decode(q[:, :, 0], k[:, :, 0], v[:, :, 0], torch.zeros(2, HEADS, D, E), activated=letters)


def test_extend(device):
    """Requests of one token and of more; other letters are refused by name."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(9, 2, 16, generator=generator).to(device) for _ in range(3))
    state, slope = torch.randn(2, 2, 16, 16, generator=generator).to(device), torch.tensor([0.1, 0.0], device=device)
    ends = torch.tensor([0, 1, 9], device=device)
    one, two = state.clone(), state.clone()
    got = extend(q, k, v, one, ends, slope, activated="kv")
    want = extend(q, F.silu(k), F.silu(v), two, ends, slope)
    for a, b in ((got, want), (one, two)):
        assert (a - b).norm() <= 1e-6 * b.norm()
    with pytest.raises(ValueError, match="extend: activated is 'kx', expected letters of 'qkv'"):
        extend(q, k, v, one, ends, slope, activated="kx")
