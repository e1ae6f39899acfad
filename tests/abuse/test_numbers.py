"""Numbers at the ends of what a dtype has, and those that are none."""

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case, accumulation_dtype
from tests.support.tolerance import check_backward, check_forward, tiniest
from triton_ref import naive

la2 = torch.ops.la2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")
DTYPES = (BF16, FP16, FP32, FP64)
NAMES = ("out", "final_state", "dq", "dk", "dv")
CHUNK = 64


def problem(device, dtype, lengths=None, dims=(32, 64)):
    x = Case(heads=3, batch=2, length=300, lengths=lengths, key_dim=dims[0], value_dim=dims[1], dtype=dtype).make(
        device
    )
    x.slope = torch.tensor([0.0, 0.05, 1.0], dtype=accumulation_dtype(dtype), device=device)
    return x


def run(x):
    """dslope is left out, which has kernels of its own and is a sum over all rows."""
    grads = la2.backward(*x.grads, *x.args, **x.options, need_dslope=False)
    return dict(zip(NAMES, (*la2.forward_with_state(*x.args, **x.options), *grads[:3]), strict=True))


#: Which rows of a result a row i of an input may reach: itself, those from it on, those up to it. Not named: none.
#: `o_t = sum over j <= t of (q_t . k_j) v_j`, and the loss is the sum of grad_out_t . o_t.
REACH = {
    "q": {"out": "own", "dk": "up to", "dv": "up to"},
    "k": {"out": "from", "final_state": "all", "dq": "from", "dv": "own"},
    "v": {"out": "from", "final_state": "all", "dq": "from", "dk": "own"},
    "grad_out": {"dq": "own", "dk": "up to", "dv": "up to"},
}


@pytest.mark.parametrize("lengths", (None, (130, 70, 0, 100)), ids=("dense", "packed"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REACH)
@pytest.mark.parametrize("value", (NAN, INF, -INF))
def test_bad_rows_stay_where_causality_puts_them(device, value, name, dtype, lengths):
    """To the bit: other heads, other sequences, and the rows that a row cannot reach. The CPU keeps to the row. The
    kernels of a GPU multiply whole chunks by a mask that is zero on the acausal side, and zero times NaN is NaN: there
    rows of the same chunk of 64, counted from the start of the sequence, may go with it, and none before or behind."""
    x = problem(device, dtype, lengths)
    clean = run(x)
    begin, end = (0, 300) if lengths is None else (130, 200)
    sequence = 1
    batch = sequence if lengths is None else 0
    for row in (begin, begin + 37, end - 1):
        bad = x.map(lambda t: t.clone())
        getattr(bad, name)[batch, 1, row] = value
        got = run(bad)
        first, last = row, row + 1
        if device == "cuda":
            first = begin + (row - begin) // CHUNK * CHUNK
            last = min(first + CHUNK, end)
        for result in NAMES:
            reach = REACH[name].get(result)
            may_change = torch.zeros(got[result].shape, dtype=torch.bool, device=device)
            if reach == "all":
                may_change[sequence, 1] = True
            elif reach is not None:
                rows = {"own": slice(row, row + 1), "from": slice(first, end), "up to": slice(begin, last)}[reach]
                may_change[batch, 1, rows] = True
            same = got[result] == clean[result]
            assert (same | may_change).all(), f"{result}, row {row}: changed where {name} does not reach"
        # And it arrives: nobody has made a number of it.
        if name == "q":
            assert not got["out"][batch, 1, row].isfinite().any()
        if name in "kv":
            assert (
                not got["out"][batch, 1, row].isfinite().all() and not got["final_state"][sequence, 1].isfinite().all()
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slope_that_is_no_number_stays_in_its_head(device, dtype):
    x = problem(device, dtype)
    clean = run(x)
    got = run(x.replace(slope=torch.tensor([0.0, NAN, 1.0], dtype=x.slope.dtype, device=device)))
    for name in NAMES:
        assert torch.equal(got[name][:, [0, 2]], clean[name][:, [0, 2]]), name
    assert got["out"][:, 1, 1:].isnan().any()


@pytest.mark.parametrize("dtype", (BF16, FP32, FP64), ids=str)
def test_large_and_small_cancel_exactly(device, dtype):
    """Powers of two in q and k that cancel each other leave every bit: nothing overflows, nothing is rounded away."""
    x = problem(device, dtype).replace(initial_state=None)
    x.grad_final_state = torch.zeros_like(x.grad_final_state)
    clean = run(x)
    factor = 2.0**40
    scaled = x.replace(q=x.q * factor, k=x.k / factor)
    got = run(scaled)
    assert torch.equal(got["out"], clean["out"]) and torch.equal(got["final_state"] * factor, clean["final_state"])
    assert torch.equal(got["dq"] * factor, clean["dq"]) and torch.equal(got["dk"] / factor, clean["dk"])
    assert torch.equal(got["dv"], clean["dv"])


@pytest.mark.parametrize("name", ("q", "k", "v"))
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
@pytest.mark.parametrize("factor", (1e30, 1e-30))
def test_thirty_decades(device, factor, dtype, name):
    """One operand of 1e30 or 1e-30: as accurate as any."""
    x = problem(device, dtype)
    x = x.replace(**{name: (x.q if name == "q" else x.k if name == "k" else x.v) * factor})
    if name != "q":  # beside a state of 1 the smaller part would drown
        x = x.replace(initial_state=None)
        x.grad_final_state = torch.zeros_like(x.grad_final_state)
    check_forward(x, *la2.forward_with_state(*x.args, **x.options))
    grads = la2.backward(*x.grads, *x.args, **x.options)
    check_backward(x, (*grads[:3], None, grads[4]))


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_overflow_stays_in_its_head(device, dtype):
    """1e30 in q, k and v has no float32 product: infinities and NaN there, and every bit elsewhere."""
    x = problem(device, dtype)
    clean = run(x)
    bad = x.map(lambda t: t.clone())
    for t in (bad.q, bad.k, bad.v):
        t[1, 1] *= 1e30
    got = run(bad)
    assert not got["out"][1, 1].isfinite().any()
    for name in NAMES:
        keep = torch.ones(got[name].shape, dtype=torch.bool, device=device)
        keep[1, 1] = False
        assert torch.equal(got[name][keep], clean[name][keep]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals(device, dtype):
    """Values below the smallest normal number may be taken for zero: each is off by less than that, and no more."""
    x = problem(device, dtype).replace(initial_state=None)
    small = tiniest(dtype)
    x.v = (x.v.double() * small / 8).to(dtype)
    assert ((x.v != 0) & (x.v.abs() < small)).any()
    out, state = la2.forward_with_state(*x.args, **x.options)
    want, want_state = naive.quadratic(x.q.double(), x.k.double(), x.v.double(), x.slope.double(), scale=x.scale)
    # As if every value were off by `small`, besides the rounding of sums and of products' operands (one part in 2^7).
    terms = naive.quadratic(x.q.double().abs(), x.k.double().abs(), torch.ones_like(want), x.slope.double(), scale=1.0)
    assert ((out.double() - want).abs() <= small * (1.01 * terms[0] + 1)).all()
    assert ((state.double() - want_state).abs() <= small * (1.01 * terms[1] + 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_gives_nothing(device, dtype):
    x = problem(device, dtype).map(torch.zeros_like)
    assert all(not t.any() for t in run(x).values())
    assert not la2.backward(*x.grads, *x.args, **x.options)[3].any()
