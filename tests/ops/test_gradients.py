"""Autograd on the operators: first and second derivatives of everything, in both directions."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case
from tests.support.tolerance import GRADIENTS, gradient_truth

la2 = torch.ops.la2

SMALL = {
    "dense": Case(heads=2, batch=2, length=5, key_dim=8, value_dim=8, dtype=torch.float64, scale=0.5),
    "two chunks": Case(heads=1, length=19, key_dim=8, value_dim=8, dtype=torch.float64, layout="bnhd"),
    "wide value": Case(heads=2, length=4, key_dim=8, value_dim=16, dtype=torch.float64, layout="qkv"),
    "packed": Case(heads=2, lengths=(2, 0, 4), key_dim=8, value_dim=8, dtype=torch.float64, slope_per_seq=True),
    "shared": Case(heads=2, lengths=(2, 0, 4), key_dim=8, value_dim=8, dtype=torch.float64),
    "no state": Case(heads=2, length=5, key_dim=8, value_dim=8, dtype=torch.float64, state_layout=None),
    "no slope": Case(heads=1, length=5, key_dim=8, value_dim=8, dtype=torch.float64, slope="none"),
    "one slope": Case(heads=1, length=3, key_dim=8, value_dim=8, dtype=torch.float64, slope="mixed"),
}


def function_of_leaves(case, device):
    """(function of the tensors that a gradient exists for, these tensors)"""
    x = case.make(device)
    given = [t is not None for t in (*x.args, x.initial_state)]
    leaves = [t.detach().clone().requires_grad_() for t in (*x.args, x.initial_state) if t is not None]

    def function(*tensors):
        left = iter(tensors)
        q, k, v, slope, state = (next(left) if is_given else None for is_given in given)
        return la2.forward_with_state(q, k, v, slope, initial_state=state, cu_seqlens=x.cu_seqlens, scale=x.scale)

    return function, leaves


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_gradcheck(device, case):
    function, leaves = function_of_leaves(case, device)
    assert gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("name", ("dense", "two chunks", "packed", "no slope"))
def test_gradgradcheck(device, name):
    function, leaves = function_of_leaves(SMALL[name], device)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_second_derivatives_equal_those_of_the_specification(device, case):
    """A scalar of all first derivatives, differentiated again: gradgradcheck's fast mode sees one random direction."""
    from triton_ref import naive

    x = case.make(device)

    def second(forward):
        leaves = [t.detach().clone().requires_grad_() for t in (*x.args, x.initial_state) if t is not None]
        left = iter(leaves)
        q, k, v, slope, state = (None if t is None else next(left) for t in (*x.args, x.initial_state))
        grads = [t.detach().clone().requires_grad_() for t in x.grads]
        values = forward(q, k, v, slope, initial_state=state, cu_seqlens=x.cu_seqlens, scale=x.scale)
        first = torch.autograd.grad(values, leaves, grads, create_graph=True)
        loss = sum((g * torch.sin(torch.arange(g.numel(), device=device)).view(g.shape)).sum() for g in first)
        return torch.autograd.grad(loss, [*leaves, *grads], allow_unused=True, materialize_grads=True)

    for got, want in zip(second(la2.forward_with_state), second(naive.quadratic), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_one_gradient_at_a_time(device, wanted):
    """Which inputs require gradients must not change a gradient, nor give one that nobody asked for."""
    x = Case(heads=2, batch=2, length=40, dtype=torch.float64, slope_per_seq=True, slope="mixed").make(device)
    leaves = dict(zip(GRADIENTS, (*x.args, x.initial_state), strict=True))
    leaves[wanted] = leaves[wanted].detach().clone().requires_grad_()
    q, k, v, slope, state = leaves.values()
    values = la2.forward_with_state(q, k, v, slope, initial_state=state)
    torch.autograd.backward(values, x.grads)
    torch.testing.assert_close(leaves[wanted].grad, gradient_truth(x)[wanted], rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_the_final_state_alone(device):
    x = Case(heads=2, batch=2, length=40, dtype=torch.float64, slope="mixed").make(device)
    q, k, v, slope, state = (t.detach().clone().requires_grad_() for t in (*x.args, x.initial_state))
    _, final_state = la2.forward_with_state(q, k, v, slope, initial_state=state)
    final_state.backward(x.grad_final_state)
    x.grad_out = torch.zeros_like(x.grad_out)
    truth = gradient_truth(x)
    assert q.grad is None or not q.grad.any()
    for name, leaf in zip(GRADIENTS[1:], (k, v, slope, state), strict=True):
        torch.testing.assert_close(leaf.grad, truth[name], rtol=1e-10, atol=1e-10)


def test_a_chain_of_calls_is_differentiated_as_one(device):
    """Gradients cross from one call to the one before it through the state."""
    x = Case(heads=2, length=70, dtype=torch.float64).make(device)
    leaves = [t.detach().clone().requires_grad_() for t in (*x.args, x.initial_state)]
    q, k, v, slope, state = leaves
    outs = []
    for lo, hi in ((0, 1), (1, 40), (40, 40), (40, 70)):
        out, state = la2.forward_with_state(*(t[:, :, lo:hi] for t in (q, k, v)), slope, initial_state=state)
        outs.append(out)
    got = torch.autograd.grad((torch.cat(outs, 2), state), leaves, x.grads)
    truth = gradient_truth(x)
    for name, g in zip(GRADIENTS, got, strict=True):
        torch.testing.assert_close(g, truth[name], rtol=1e-10, atol=1e-10)


def test_no_graph_where_none_is_wanted(device):
    x = Case(length=4).make(device)
    q = x.q.requires_grad_()
    with torch.no_grad():
        assert not la2.forward(q, x.k, x.v).requires_grad
    with torch.inference_mode():
        assert la2.forward(q.detach(), x.k, x.v).is_inference()
    assert la2.forward(q, x.k, x.v).requires_grad
