"""The whole surface with whatever fits into it: any call is right, any wrong call is a sentence."""

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

import lightning_attn2_ext
from lightning_attn2_ext.testing import forced_plan
from tests.support import tolerance
from tests.support.abuse import property_test
from tests.support.cases import Case, cases

la2 = torch.ops.la2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLANS = ("", "segments=1", "segments=2", "segments=5", "slice=64", "slice=128", "family=sm80", "blocks=1")
CALLS = ("forward", "forward_with_state", "backward", "autograd", "decode", "inference", "function", "silu")

any_case = st.one_of(
    cases(dtypes=DTYPES, limit=400), cases(dtypes=DTYPES, limit=70, dim_limit=256), cases(dtypes=DTYPES, limit=20)
)


@property_test(case=any_case, call=st.sampled_from(CALLS), plan=st.sampled_from(PLANS), threads=st.integers(1, 3))
def test_any_call_is_right(device, case, call, plan, threads):
    x = case.make(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # A plan that this device, dtype or shape does not have is an error, and no example.
        with forced_plan(plan if device == "cuda" else ""):
            globals()[f"_{call}"](x)
    except RuntimeError as error:
        assume("no kernel of family" not in str(error) and "LA2_PLAN" not in str(error))
        raise
    finally:
        torch.set_num_threads(before)


def check_forward(x, *got):
    """float64: the truth has the same roundings, so that the two may be twice as far apart."""
    against = tuple(tolerance.forward_truth(x).values()) if x.q.dtype == torch.float64 else None
    tolerance.check_forward(x, *got, against=against)


def check_backward(x, grads):
    against = None
    if x.q.dtype == torch.float64:
        truth = tolerance.gradient_truth(x)
        against = [truth.get(name, torch.empty(0)) for name in tolerance.GRADIENTS]
    tolerance.check_backward(x, grads, against=against)


def _forward(x):
    check_forward(x, la2.forward(*x.args, **x.options))


def _forward_with_state(x):
    check_forward(x, *la2.forward_with_state(*x.args, **x.options))


def _backward(x):
    check_backward(x, la2.backward(*x.grads, *x.args, **x.options))


def _inference(x):
    with torch.inference_mode():
        got = la2.forward_with_state(*x.args, **x.options)
    check_forward(x, *(t.clone() for t in got))


def _function(x):
    got = lightning_attn2_ext.lightning_attention(
        x.q,
        x.k,
        x.v,
        x.slope,
        scale=x.scale,
        initial_state=x.initial_state,
        cu_seqlens=x.cu_seqlens,
        return_final_state=True,
    )
    check_forward(x, *got)


def _silu(x):
    """What the operator makes of tensors that torch's SiLU made. Apart may be, in units of eps of the sum of |terms|,
    each of three operands by one place, what is rounded on the way (scores, state, weighted values), the result of
    either, and the order of sums: 8."""
    silu = 1 + x.q.shape[2] % 7
    rows = [torch.nn.functional.silu(t) if silu >> i & 1 else t for i, t in enumerate((x.q, x.k, x.v))]
    wants = la2.forward_with_state(*rows, x.slope, **x.options)
    state = None if x.initial_state is None else x.initial_state.abs()
    terms = la2.forward_with_state(
        *(t.abs() for t in rows), x.slope, **x.options | {"initial_state": state, "scale": abs(x.scale)}
    )
    found = la2.forward_silu(*x.args, **x.options, silu=silu)
    assert found[0].stride() == la2.forward(*x.args, **x.options).stride()
    for got, want, size in zip(found, wants, terms, strict=True):
        assert got.shape == want.shape and got.isfinite().all()
        assert (got.double() - want.double()).norm() <= 8 * torch.finfo(x.q.dtype).eps * size.double().norm()


def _autograd(x):
    names = ("q", "k", "v", "slope", "initial_state")
    leaves = {n: None if getattr(x, n) is None else getattr(x, n).detach().requires_grad_() for n in names}
    y = x.replace(**leaves)
    out, state = la2.forward_with_state(*y.args, **y.options)
    given = [leaves[n] for n in names if leaves[n] is not None]
    found = iter(torch.autograd.grad((out, state), given, (x.grad_out, x.grad_final_state)))
    grads = [None if leaves[n] is None else next(found) for n in names]
    check_forward(x, out.detach(), state.detach())
    check_backward(x, grads)


def _decode(x):
    """A sequence's last token by a decode step, behind a prefill of the others."""
    assume(x.cu_seqlens is None and x.q.shape[2] > 0)
    head = x.replace(**{n: getattr(x, n)[:, :, :-1] for n in "qkv"})
    out, state = la2.forward_with_state(*head.args, **head.options)
    last = (t[:, :, -1] for t in (x.q, x.k, x.v))
    row = la2.decode(*last, state, x.slope, scale=x.scale)
    check_forward(x, torch.cat([out, row[:, :, None]], 2), state)


# ---- wrong calls

ARGUMENTS = ("q", "k", "v", "slope", "initial_state", "cu_seqlens", "grad_out", "grad_final_state")
WAYS = (
    "fewer dims",
    "more dims",
    "shorter",
    "longer",
    "empty",
    "dtype",
    "expanded",
    "turned",
    "other device",
    "values",
)


def spoil(t, way, dim, number):
    if not t.dim():
        return t[None]
    if way == "fewer dims":
        return t[0] if t.shape[0] else t.reshape(-1)
    if way == "more dims":
        return t[None]
    if way in ("shorter", "longer", "empty"):
        dim %= t.dim()
        size = {"shorter": max(t.shape[dim] - number, 0), "longer": t.shape[dim] + number, "empty": 0}[way]
        return t.new_zeros(*t.shape[:dim], size, *t.shape[dim + 1 :])
    if way == "dtype":
        wide = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool)
        return t.to(wide[number % len(wide)])
    if way == "expanded":
        dim %= t.dim()
        return t.narrow(dim, 0, min(1, t.shape[dim])).expand_as(t)
    if way == "turned":
        return t.transpose(dim % t.dim(), -1)
    if way == "other device":
        return t.cpu() if t.is_cuda else t.to("meta")
    return t + number if t.dtype in (torch.int32, torch.int64) else t * float("nan")


@property_test(
    case=cases(dtypes=DTYPES, limit=40, dim_limit=64),
    name=st.sampled_from(ARGUMENTS),
    way=st.sampled_from(WAYS),
    dim=st.integers(0, 3),
    number=st.integers(1, 9),
    backward=st.booleans(),
)
def test_any_wrong_call_is_a_sentence(device, case, name, way, dim, number, backward):
    """An argument that is not what it should be: an error that names the operator, or a result of the usual shapes
    where it happens to fit. Whatever came of it, the next call is right."""
    x = case.make(device)
    assume(getattr(x, name) is not None and (backward or not name.startswith("grad")))
    # A meta tensor beside others goes to torch's fake kernels, which are not the operator's.
    assume(not (way == "other device" and device == "cpu"))
    wrong = x.replace(**{name: spoil(getattr(x, name), way, dim, number)})
    try:
        if backward:
            got = la2.backward(*wrong.grads, *wrong.args, **wrong.options)
            assert [g.shape for g in got[:3]] == [wrong.q.shape, wrong.k.shape, wrong.v.shape]
        else:
            out, state = la2.forward_with_state(*wrong.args, **wrong.options)
            assert out.shape == wrong.v.shape and state.shape[1:] == (*wrong.q.shape[1::2], wrong.v.shape[3])
    except RuntimeError as error:
        said = str(error)
        # Between two devices torch speaks first.
        assert said.startswith("la2::") or way == "other device", said
        assert way == "other device" or ("expected" in said and len(said) < 400), said
    if device == "cuda":
        torch.cuda.synchronize()
    _forward_with_state(x)


@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_a_wrong_call_is_an_error_at_all(device, name):
    """The property above lets results pass; these must not."""
    x = Case(heads=2, length=5).make(device)
    for way in ("fewer dims", "more dims", "longer", "dtype"):
        with pytest.raises(RuntimeError, match=r"la2::forward: .*expected"):
            la2.forward(*x.replace(**{name: spoil(getattr(x, name), way, 1, 1)}).args)
