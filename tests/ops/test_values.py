"""Values and gradients of the operators against the float64 specification, and against the Triton reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import CHUNKS, SLOPES, Case, cases
from tests.support.tolerance import check_backward, check_forward
from triton_ref import naive

la2 = torch.ops.la2
CI = settings().derandomize
HALVES = (torch.bfloat16, torch.float16)


@given(case=cases())
def test_forward(device, case):
    x = case.make(device)
    out, final_state = la2.forward_with_state(*x.args, **x.options)
    check_forward(x, out, final_state)
    assert torch.equal(la2.forward(*x.args, **x.options), out)


@given(case=cases(limit=270))
def test_backward(device, case):
    x = case.make(device)
    check_backward(x, la2.backward(*x.grads, *x.args, **x.options))


@settings(max_examples=15 if CI else 300)
@given(case=cases(limit=270))
def test_backward_without_optional_parts(device, case):
    """No gradient of the final state is one of zero; need_dslope alone decides whether dslope comes."""
    x = case.make(device)
    grads = la2.backward(x.grad_out, None, *x.args, **x.options, need_dslope=False)
    assert grads[3].shape == (0,)
    x.grad_final_state = torch.zeros_like(x.grad_final_state)
    check_backward(x, (*grads[:3], None, grads[4]))


@settings(max_examples=12 if CI else 200)
@given(case=cases(dim_limit=256, limit=70))
def test_wide_heads(device, case):
    x = case.make(device)
    check_forward(x, *la2.forward_with_state(*x.args, **x.options))
    check_backward(x, la2.backward(*x.grads, *x.args, **x.options))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("chunk", CHUNKS)
def test_lengths_around_chunk_boundaries(device, chunk, dtype):
    """One to three chunks, one row less, exact, one more: the state of a short last chunk and the empty one."""
    for n in (1, 2, 3):
        for length in (n * chunk - 1, n * chunk, n * chunk + 1):
            x = Case(length=length, key_dim=16, value_dim=24, dtype=dtype, slope="mixed", seed=length).make(device)
            x.slope = torch.tensor([0.02, 0.4], device=device)
            check_forward(x, *la2.forward_with_state(*x.args, **x.options))
            check_backward(x, la2.backward(*x.grads, *x.args, **x.options))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("slope", (0.0, 0.03, 1.0))
def test_rows_behind_every_boundary_by_themselves(device, slope, dtype):
    """Two rows at each multiple of 16 are held to their own size: a factor e^s too much behind a boundary, as published
    kernels have it, is small in a whole tensor and large there."""
    x = Case(length=290, heads=1, dtype=dtype, key_dim=32, value_dim=32).make(device)
    x.slope = torch.tensor([slope], device=device)
    x.windows = [(lo, lo + 2) for lo in range(0, 290, 16)]
    check_forward(x, la2.forward(*x.args, **x.options))


@pytest.mark.parametrize("slope", sorted(SLOPES))
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_every_kind_of_slope(device, slope, dtype):
    for per_seq in (False, True):
        for lengths in (None, (0, 70, 0, 1, 129, 0)):
            case = Case(heads=6, batch=2, length=150, lengths=lengths, slope=slope, slope_per_seq=per_seq, dtype=dtype)
            x = case.make(device)
            check_forward(x, *la2.forward_with_state(*x.args, **x.options))
            check_backward(x, la2.backward(*x.grads, *x.args, **x.options))


@settings(max_examples=15 if CI else 300)
@given(case=cases(dtypes=(torch.float64,), limit=150, dim_limit=64))
def test_float64_to_twelve_digits(device, case):
    x = case.make(device)
    got = la2.forward_with_state(*x.args, **x.options)
    got += tuple(g for g in la2.backward(*x.grads, *x.args, **x.options) if g.shape != (0,))
    want = naive.recurrent(*x.args, **x.options)
    want += tuple(g for g in naive.backward_chunked(*x.grads, *x.args, **x.options) if g is not None)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float64
        assert (a - b).norm() <= 1e-12 * (b.norm() + 1), (case, (a - b).norm() / b.norm())


def decode_cases():
    return cases(limit=16).filter(lambda c: c.lengths is None)


@given(case=decode_cases(), data=st.data())
def test_decode(device, case, data):
    """Rows of a decode step are sequences of one token; slots that no row names keep every bit."""
    rows = data.draw(st.integers(1, 5), "rows")
    slots = rows + data.draw(st.integers(0, 3), "unused slots")
    order = data.draw(st.permutations(range(slots)), "slots")[:rows]
    index = [-1 - i if data.draw(st.booleans(), "padding") else slot for i, slot in enumerate(order)]
    case = Case(**(vars(case) | {"batch": slots, "length": 1, "state_layout": case.state_layout or "kv"}))
    x = case.make(device)
    q, k, v = (t[:rows, :, 0] for t in (x.q, x.k, x.v))
    slope = x.slope[:rows] if x.slope is not None and x.slope.dim() == 2 else x.slope
    before = x.initial_state.clone()
    indices = torch.tensor(index, dtype=case.index_dtype, device=device)

    out = la2.decode(q, k, v, x.initial_state, slope, state_indices=indices, scale=x.scale)

    live = [i for i, slot in enumerate(index) if slot >= 0]
    used = [index[i] for i in live]
    untouched = [i for i in range(slots) if i not in used]
    assert torch.equal(x.initial_state[untouched], before[untouched])
    assert not out[[i for i in range(rows) if i not in live]].any()
    step = {"q": x.q[live], "k": x.k[live], "v": x.v[live], "initial_state": before[used]}
    step["slope"] = slope[live] if slope is not None and slope.dim() == 2 else slope
    check_forward(x.replace(**step), out[live][:, :, None], x.initial_state[used])


@settings(max_examples=12 if CI else 200)
@given(data=st.data())
def test_against_triton(device, data):
    pytest.importorskip("triton")
    from triton_ref.backward import backward
    from triton_ref.forward import forward

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here and does not interpret")
    # Interpreted, a line of a kernel takes a millisecond; compiled, each new pair of dims some seconds.
    case = data.draw(cases(limit=50, dim_limit=40) if device == "cpu" else cases())
    if device == "cuda":
        key_dim, value_dim = data.draw(st.sampled_from([(16, 16), (128, 64), (40, 96)]), "dims")
        case = Case(**(vars(case) | {"key_dim": key_dim, "value_dim": value_dim}))
    chunk = 16 if device == "cpu" else None
    x = case.make(device)
    triton_values = forward(*x.args, **x.options, chunk=chunk)
    check_forward(x, *la2.forward_with_state(*x.args, **x.options), against=triton_values)
    triton_grads = backward(*x.grads, *x.args, **x.options, chunk=chunk)
    check_backward(x, la2.backward(*x.grads, *x.args, **x.options), against=triton_grads)
