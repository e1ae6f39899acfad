"""The three forms of the specification agree with each other, and its backward pass with autograd."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import Case, cases
from tests.support.tolerance import GRADIENTS, gradient_truth
from triton_ref import naive

doubles = cases(dtypes=(torch.float64,), limit=70, dim_limit=32)


def assert_agree(got, want, limit=1e-12):
    """Relative to the largest element, or absolute below 1."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a - b).abs().max() <= limit * max(1.0, b.abs().max())


@given(doubles, st.sampled_from((1, 5, 16, 64)))
def test_three_forms_agree(case, chunk):
    x = case.make()
    want = naive.recurrent(*x.args, **x.options)
    assert_agree(naive.quadratic(*x.args, **x.options), want)
    assert_agree(naive.chunked(*x.args, **x.options, chunk=chunk), want)


@given(doubles, st.sampled_from((1, 5, 16, 64)))
def test_backward_by_hand_is_autograd(case, chunk):
    x = case.make()
    want = gradient_truth(x, naive.recurrent)
    got = naive.backward_chunked(*x.grads, *x.args, **x.options, chunk=chunk)
    given_names = [n for n in GRADIENTS if n in want]
    assert [n for n, g in zip(GRADIENTS, got, strict=True) if g is not None] == given_names
    assert_agree([g for g in got if g is not None], [want[n] for n in given_names], 1e-10)


@pytest.mark.parametrize("slope", (0.0, 0.5, 3.0))
def test_rows_behind_a_chunk_boundary(slope):
    """Row 16 sees row 15 one step away and row 0 sixteen steps away: the factor an off-by-one gets wrong."""
    x = Case(length=40, heads=1, dtype=torch.float64, state_layout=None).make()
    out, _ = naive.chunked(x.q, x.k, x.v, torch.tensor([slope], dtype=torch.float64), chunk=16)
    for i in (0, 15, 16, 17, 31, 32, 39):
        weights = torch.exp(-slope * (i - torch.arange(i + 1.0).double())) * (x.k[0, 0, : i + 1] @ x.q[0, 0, i])
        torch.testing.assert_close(out[0, 0, i], weights @ x.v[0, 0, : i + 1], rtol=1e-12, atol=1e-12)


def test_final_state_of_a_short_last_chunk():
    """The state decays by the rows there are, not by the rows a chunk can have."""
    x = Case(length=19, heads=1, dtype=torch.float64, slope="usual").make()
    _, state = naive.chunked(*x.args, initial_state=x.initial_state, chunk=16)
    to_end = torch.exp(-0.5 * (18 - torch.arange(19.0).double()))[:, None]
    want = torch.exp(torch.tensor(-0.5 * 19).double()) * x.initial_state[0, 0]
    want = want + (to_end * x.k[0, 0]).T @ x.v[0, 0]
    torch.testing.assert_close(state[0, 0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slope", (50.0, 1e4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_steep_slopes_keep_only_the_own_token(slope, dtype):
    """exp(-50) is below the rounding of everything here and exp(-1e4) is zero; a quotient of powers would be NaN."""
    x = Case(length=300, heads=1, dtype=dtype, state_layout="kv").make()
    s = torch.tensor([slope], dtype=dtype)
    out, state = naive.chunked(x.q, x.k, x.v, s, initial_state=x.initial_state, dtype=dtype)
    own = (x.q * x.k).sum(-1, keepdim=True) * x.v
    torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[0, 0], torch.outer(x.k[0, 0, -1], x.v[0, 0, -1]), rtol=1e-5, atol=1e-5)
    grads = naive.backward_chunked(*x.grads, x.q, x.k, x.v, s, initial_state=x.initial_state, dtype=dtype)
    assert all(torch.isfinite(g).all() for g in grads)


def test_decode_steps_are_the_recurrence():
    x = Case(batch=3, length=9, heads=2, dtype=torch.float64, slope="mixed", slope_per_seq=True, scale=0.3).make()
    want, final = naive.recurrent(*x.args, **x.options)
    slots = torch.tensor([4, -1, 2])
    pool = torch.full((5, 2, 16, 16), float("nan"), dtype=torch.float64)
    pool[slots[[0, 2]]] = x.initial_state[[0, 2]]
    for t in range(9):
        rows = (y[:, :, t] for y in (x.q, x.k, x.v))
        out, pool = naive.decode(*rows, pool, x.slope, state_indices=slots, scale=x.scale)
        torch.testing.assert_close(out[[0, 2]], want[[0, 2], :, t], rtol=1e-12, atol=1e-12)
        assert not out[1].any()
    torch.testing.assert_close(pool[slots[[0, 2]]], final[[0, 2]], rtol=1e-12, atol=1e-12)
    assert pool[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("ends", ([0, 3, 2, 5], [1, 5], [0, 4]))
def test_wrong_boundaries_are_refused(ends):
    x = Case(length=5).make()
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 5"):
        naive.chunked(x.q, x.k, x.v, cu_seqlens=torch.tensor(ends))


def test_needs_neither_triton_nor_the_package():
    code = "import sys; sys.modules['triton'] = None; import triton_ref.naive as x; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "lightning_attn2_ext" not in run.stdout.split()
