"""Wrong arguments: an error that names operator and argument and says what came and what was wanted. Never a crash."""

import re

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case

la2 = torch.ops.la2
B, H, N, D, E = 2, 3, 5, 16, 24


def arguments(**changes):
    x = Case(heads=H, batch=B, length=N, key_dim=D, value_dim=E).make()
    named = {"q": x.q, "k": x.k, "v": x.v, "slope": x.slope, "initial_state": x.initial_state}
    return named | changes


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# (argument, its wrong value or all changes, what the message must hold besides operator and argument)
WRONG = {
    "q of rank 3": ({"q": zeros(H, N, D)}, "q", "[3, 5, 16]", "4"),
    "k of rank 5": ({"k": zeros(1, B, H, N, D)}, "k", "[1, 2, 3, 5, 16]", "4"),
    "v of rank 2": ({"v": zeros(N, E)}, "v", "[5, 24]", "4"),
    "k of another batch": ({"k": zeros(B + 1, H, N, D)}, "k", "3", "2"),
    "k of other heads": ({"k": zeros(B, 1, N, D)}, "k", "1", "3"),
    "k of another length": ({"k": zeros(B, H, N + 1, D)}, "k", "6", "5"),
    "k of another key dim": ({"k": zeros(B, H, N, D + 8)}, "k", "24", "16"),
    "v of another batch": ({"v": zeros(1, H, N, E)}, "v", "1", "2"),
    "v of other heads": ({"v": zeros(B, H + 1, N, E)}, "v", "4", "3"),
    "v of another length": ({"v": zeros(B, H, N - 1, E)}, "v", "4", "5"),
    "key dim 12": ({"q": zeros(B, H, N, 12), "k": zeros(B, H, N, 12)}, "q", "12", "multiple of 8"),
    "key dim 264": ({"q": zeros(B, H, N, 264), "k": zeros(B, H, N, 264)}, "q", "264", "256"),
    "key dim 0": ({"q": zeros(B, H, N, 0), "k": zeros(B, H, N, 0)}, "q", "0", "multiple of 8"),
    "value dim 20": ({"v": zeros(B, H, N, 20)}, "v", "20", "multiple of 8"),
    "value dim 512": ({"v": zeros(B, H, N, 512)}, "v", "512", "256"),
    "k of another dtype": ({"k": zeros(B, H, N, D, dtype=torch.bfloat16)}, "k", "bfloat16", "float32"),
    "v of another dtype": ({"v": zeros(B, H, N, E, dtype=torch.float64)}, "v", "float64", "float32"),
    "integers": (
        {n: zeros(B, H, N, d, dtype=torch.int64) for n, d in (("q", D), ("k", D), ("v", E))},
        "q",
        "int64",
        "float32",
    ),
    "booleans": ({"k": zeros(B, H, N, D, dtype=torch.bool)}, "k", "(?i)bool", "float32"),
    "slope of one head too few": ({"slope": zeros(H - 1)}, "slope", "[2]", "[3]"),
    "slope of no dimension": ({"slope": zeros()}, "slope", "[]", "[3]"),
    "slope of another batch": ({"slope": zeros(B + 1, H)}, "slope", "[3, 3]", "[2, 3]"),
    "slope turned": ({"slope": zeros(H, B)}, "slope", "[3, 2]", "[2, 3]"),
    "slope of rank 3": ({"slope": zeros(B, H, 1)}, "slope", "[2, 3, 1]", "[2, 3]"),
    "slope in half": ({"slope": zeros(H, dtype=torch.bfloat16)}, "slope", "bfloat16", "float32"),
    "slope in double": ({"slope": zeros(H, dtype=torch.float64)}, "slope", "float64", "float32"),
    "state turned": ({"initial_state": zeros(B, H, E, D)}, "initial_state", "[2, 3, 24, 16]", "[2, 3, 16, 24]"),
    "state of one row": (
        {"initial_state": zeros(1, H, D, E)},
        "initial_state",
        "[1, 3, 16, 24]",
        "[2, 3, 16, 24]",
    ),
    "state without batch": ({"initial_state": zeros(H, D, E)}, "initial_state", "[3, 16, 24]", "[2, 3, 16, 24]"),
    "state in half": (
        {"initial_state": zeros(B, H, D, E, dtype=torch.bfloat16)},
        "initial_state",
        "bfloat16",
        "float32",
    ),
    "packed batch of two": ({"cu_seqlens": torch.tensor([0, N])}, "q", "2", "1", "cu_seqlens"),
}
ONE = {"q": zeros(1, H, N, D), "k": zeros(1, H, N, D), "v": zeros(1, H, N, E), "initial_state": None}
WRONG |= {
    "boundaries in float": (ONE | {"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens", "float32", "int32"),
    "boundaries in int16": (
        ONE | {"cu_seqlens": zeros(2, dtype=torch.int16)},
        "cu_seqlens",
        "(?i)short",
        "int32",
    ),
    "boundaries of rank 2": (ONE | {"cu_seqlens": zeros(1, 2, dtype=torch.int32)}, "cu_seqlens", "[1, 2]", "+ 1]"),
    "no boundaries": (ONE | {"cu_seqlens": zeros(0, dtype=torch.int32)}, "cu_seqlens", "[0]", "+ 1]"),
    "slope not per sequence": (
        ONE | {"cu_seqlens": torch.tensor([0, 2, 5]), "slope": zeros(1, H)},
        "slope",
        "[1, 3]",
        "[2, 3]",
    ),
    "state not per sequence": (
        ONE | {"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": zeros(1, H, D, E)},
        "initial_state",
        "[1, 3, 16, 24]",
        "[2, 3, 16, 24]",
    ),
}
# Values of boundaries are read where reading is free, on the CPU; on a GPU they stay there.
WRONG_ON_CPU = {
    "boundaries that begin late": (ONE | {"cu_seqlens": torch.tensor([1, 5])}, "cu_seqlens", "1", "0"),
    "boundaries that fall": (ONE | {"cu_seqlens": torch.tensor([0, 4, 2, 5])}, "cu_seqlens", "2", "4"),
    "boundaries that end early": (ONE | {"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens", "4", "5"),
    "boundaries past the end": (ONE | {"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens", "6", "5"),
}


def move(named, device):
    return {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in named.items()}


def assert_refused(operator, call, argument, *parts):
    with pytest.raises(RuntimeError) as caught:
        call()
    message = str(caught.value).splitlines()[0]
    assert f"la2::{operator}:" in message
    assert re.search(rf"\b{argument}\b", message), message
    assert "expected" in message
    for part in parts:
        pattern = part if part.startswith("(?i)") else re.escape(part)
        assert re.search(pattern, message), f"{part} is not in: {message}"


def run_prefill(operator, named):
    named = dict(named)
    q, k, v, slope = (named.pop(n) for n in ("q", "k", "v", "slope"))
    if operator == "backward":
        # The gradient that fits the right arguments, so that the wrong one is found and not this.
        return la2.backward(torch.zeros_like(v), None, q, k, v, slope, **named)
    return getattr(la2, operator)(q, k, v, slope, **named)


@pytest.mark.parametrize("operator", ("forward", "forward_with_state", "backward"))
@pytest.mark.parametrize("name", WRONG)
def test_prefill_refuses(device, operator, name):
    changes, *expected = WRONG[name]
    assert_refused(operator, lambda: run_prefill(operator, move(arguments(**changes), device)), *expected)


@pytest.mark.parametrize("operator", ("forward", "backward"))
@pytest.mark.parametrize("name", WRONG_ON_CPU)
def test_prefill_refuses_wrong_boundaries(operator, name):
    changes, *expected = WRONG_ON_CPU[name]
    assert_refused(operator, lambda: run_prefill(operator, arguments(**changes)), *expected)


WRONG_GRADS = {
    "grad_out of rank 3": (zeros(H, N, E), None, "grad_out", "[3, 5, 24]", "4"),
    "grad_out as q": (zeros(B, H, N, D), None, "grad_out", "16", "24"),
    "grad_out of another length": (zeros(B, H, N + 1, E), None, "grad_out", "6", "5"),
    "grad_out of another dtype": (zeros(B, H, N, E, dtype=torch.float16), None, "grad_out", "float16", "float32"),
    "grad_final_state turned": (zeros(B, H, N, E), zeros(B, H, E, D), "grad_final_state", "24, 16]", "16, 24]"),
    "grad_final_state in half": (
        zeros(B, H, N, E),
        zeros(B, H, D, E, dtype=torch.bfloat16),
        "grad_final_state",
        "bfloat16",
        "float32",
    ),
}


@pytest.mark.parametrize("name", WRONG_GRADS)
def test_backward_refuses_gradients(device, name):
    grad_out, grad_state, *expected = WRONG_GRADS[name]
    named = move(arguments(), device)
    grads = [None if g is None else g.to(device) for g in (grad_out, grad_state)]
    rows = [named.pop(n) for n in ("q", "k", "v", "slope")]
    assert_refused("backward", lambda: la2.backward(*grads, *rows, **named), *expected)


SLOTS = 4
WRONG_DECODE = {
    "q of rank 4": ({"q": zeros(B, H, 1, D)}, "q", "[2, 3, 1, 16]", "3"),
    "k of other rows": ({"k": zeros(B + 1, H, D)}, "k", "3", "2"),
    "v of other heads": ({"v": zeros(B, 1, E)}, "v", "1", "3"),
    "k of another dim": ({"k": zeros(B, H, D + 8)}, "k", "24", "16"),
    "value dim 20": ({"v": zeros(B, H, 20)}, "v", "20", "multiple of 8"),
    "v in half": ({"v": zeros(B, H, E, dtype=torch.float16)}, "v", "float16", "float32"),
    "state in half": ({"state": zeros(SLOTS, H, D, E, dtype=torch.float16)}, "state", "float16", "float32"),
    "state turned": ({"state": zeros(SLOTS, H, E, D)}, "state", "[4, 3, 24, 16]", "16, 24]"),
    "state of rank 3": ({"state": zeros(H, D, E)}, "state", "[3, 16, 24]", "16, 24]"),
    "state that overlaps itself": ({"state": zeros(1, H, D, E).expand(SLOTS, H, D, E)}, "state", "0", "memory"),
    "as many rows as slots without indices": ({"state_indices": None}, "state", "4", "2"),
    "indices in float": ({"state_indices": zeros(B)}, "state_indices", "float32", "int32"),
    "indices of other rows": ({"state_indices": zeros(B + 1, dtype=torch.int32)}, "state_indices", "[3]", "[2]"),
    "indices of rank 2": ({"state_indices": zeros(B, 1, dtype=torch.int32)}, "state_indices", "[2, 1]", "[2]"),
    "slope of slots": ({"slope": zeros(SLOTS, H)}, "slope", "[4, 3]", "[2, 3]"),
    "slope in double": ({"slope": zeros(H, dtype=torch.float64)}, "slope", "float64", "float32"),
}


def decode_arguments(**changes):
    named = {"q": zeros(B, H, D), "k": zeros(B, H, D), "v": zeros(B, H, E), "state": zeros(SLOTS, H, D, E)}
    named |= {"slope": zeros(H), "state_indices": torch.tensor([2, 0], dtype=torch.int32)}
    return named | changes


def run_decode(named):
    named = dict(named)
    rows = [named.pop(n) for n in ("q", "k", "v", "state", "slope")]
    return la2.decode(*rows, **named)


@pytest.mark.parametrize("name", WRONG_DECODE)
def test_decode_refuses(device, name):
    changes, *expected = WRONG_DECODE[name]
    state = changes.get("state")
    named = move(decode_arguments(**changes), device)
    if state is not None:
        named["state"] = state[:1].to(device).expand(state.shape) if not state.stride(0) else state.to(device)
    assert_refused("decode", lambda: run_decode(named), *expected)


def test_decode_refuses_slots_that_are_not_there():
    for indices in ([0, SLOTS], [1 << 30, 0]):
        named = decode_arguments(state_indices=torch.tensor(indices, dtype=torch.int32))
        assert_refused("decode", lambda named=named: run_decode(named), "state_indices", str(max(indices)), "4")
        assert not named["state"].any()


def test_decode_refuses_to_differentiate(device):
    """It overwrites its state, so a graph through it would be wrong without a word."""
    for name in ("state", "q", "k", "v", "slope"):
        named = move(decode_arguments(), device)
        named[name].requires_grad_()
        assert_refused("decode", lambda named=named: run_decode(named), name, "(?i)grad")
        assert not named["state"].any()
    named = move(decode_arguments(), device)
    named["q"].requires_grad_()
    with torch.no_grad():
        run_decode(named)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("q", "k", "v", "slope", "initial_state", "cu_seqlens"))
def test_prefill_refuses_mixed_devices(name):
    named = move(arguments(**ONE | {"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": zeros(2, H, D, E)}), "cuda")
    named[name] = named[name].cpu()
    # Torch runs the CUDA kernel as soon as one argument is on the GPU, so a q left behind is the odd one out.
    assert_refused("forward", lambda: run_prefill("forward", named), name, "cpu", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("q", "k", "v", "state", "slope", "state_indices"))
def test_decode_refuses_mixed_devices(name):
    named = move(decode_arguments(), "cuda")
    named[name] = named[name].cpu()
    assert_refused("decode", lambda: run_decode(named), name, "cpu", "cuda")


@pytest.mark.parametrize(
    "case",
    (
        Case(batch=0, length=7),
        Case(batch=3, length=0, slope_per_seq=True),
        Case(batch=4, heads=8, length=0, key_dim=128, value_dim=128, dtype=torch.bfloat16),
        Case(batch=0, length=0),
        Case(lengths=()),
        Case(lengths=(0, 0, 0), slope="none"),
        Case(heads=0, length=4, state_layout=None, slope="none"),
    ),
    ids=str,
)
def test_nothing_to_do_is_no_error(device, case):
    x = case.make(device)
    out, state = la2.forward_with_state(*x.args, **x.options)
    assert out.shape == x.v.shape
    assert state.shape == (case.num_seqs, case.heads, case.key_dim, case.value_dim)
    has_tokens = x.q.numel() > 0
    if not has_tokens:  # states pass through untouched, in both directions
        assert torch.equal(state, torch.zeros_like(state) if x.initial_state is None else x.initial_state)
    for need_dslope in (False, True):  # kernels of their own on a GPU
        dq, dk, dv, dslope, dstate = la2.backward(*x.grads, *x.args, **x.options, need_dslope=need_dslope)
        assert (dq.shape, dk.shape, dv.shape) == (x.q.shape, x.k.shape, x.v.shape)
        if x.slope is not None:
            assert dslope.shape == (x.slope.shape if need_dslope else (0,)) and not dslope.any()
        if x.initial_state is not None and not has_tokens:
            assert torch.equal(dstate, x.grad_final_state)


def test_decode_of_no_rows(device):
    state = torch.ones(3, 2, 16, 16, device=device)
    rows = torch.zeros(0, 2, 16, device=device)
    out = la2.decode(rows, rows, rows, state, state_indices=torch.zeros(0, dtype=torch.int32, device=device))
    assert out.shape == (0, 2, 16)
    assert (state == 1).all()
