"""Autocast around the operators: which arguments are cast, and what comes back."""

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case
from tests.support.tolerance import check_backward, check_forward

la2 = torch.ops.la2
DTYPES = (torch.bfloat16, torch.float16)


def problem(device):
    return Case(heads=2, batch=2, length=30, slope="usual").make(device)


def mixed(device):
    """q and v in float32, k in bfloat16: what a norm and a projection under autocast leave behind."""
    x = problem(device)
    return x.replace(k=x.k.bfloat16())


def rounded(x, dtype):
    return x.replace(q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype), grad_out=x.grad_out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(device, dtype):
    x = problem(device)
    leaves = [t.detach().clone().requires_grad_() for t in (*x.args, x.initial_state)]
    *args, state = leaves
    with torch.autocast(device, dtype):
        values = la2.forward_with_state(*args, initial_state=state, scale=0.5)
        assert torch.equal(la2.forward(*args, initial_state=state, scale=0.5), values[0])
    assert [t.dtype for t in values] == [dtype, torch.float32]
    narrow = rounded(x, dtype).replace(scale=0.5)
    check_forward(narrow, *(t.detach() for t in values))
    grads = torch.autograd.grad(values, leaves, narrow.grads)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    check_backward(narrow, grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(device, dtype):
    x = mixed(device)
    rows = [t[:, :, 0] for t in (x.q, x.k, x.v)]
    one, two = x.initial_state.clone(), x.initial_state.clone()
    with torch.autocast(device, dtype):
        out = la2.decode(*rows, one, x.slope, scale=0.5)
    assert out.dtype == dtype and one.dtype == torch.float32
    assert torch.equal(out, la2.decode(*(t.to(dtype) for t in rows), two, x.slope, scale=0.5))
    assert torch.equal(one, two) and not torch.equal(one, x.initial_state)


def test_outside_mixed_dtypes_are_refused(device):
    x = mixed(device)
    with pytest.raises(RuntimeError, match=r"la2::forward: k\.dtype is bfloat16, expected float32"):
        la2.forward(*x.args)
    with torch.autocast(device, torch.bfloat16):
        with (
            torch.autocast(device, enabled=False),
            pytest.raises(RuntimeError, match=r"la2::forward: k\.dtype is bfloat16, expected float32"),
        ):
            la2.forward(*x.args)
        assert la2.forward(*x.args).dtype == torch.bfloat16


def test_float64_is_left_alone():
    x = Case(heads=2, batch=1, length=9, dtype=torch.float64).make()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = la2.forward_with_state(*x.args, **x.options)
    assert out.dtype == state.dtype == torch.float64
    check_forward(x, out, state)


def test_compiled(device):
    x = mixed(device)

    def step(q, k, v, slope, state):
        with torch.autocast(device, torch.bfloat16):
            return la2.forward_with_state(q, k, v, slope, initial_state=state)

    leaves = [t.detach().clone().requires_grad_() for t in (*x.args, x.initial_state)]
    cotangents = (x.grad_out.bfloat16(), x.grad_final_state)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), step(*leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(want, leaves, cotangents)):
        assert torch.equal(a, b)
