"""testing.py itself: the truth against a direct sum, and bounds that a wrong kernel cannot pass."""

import pytest
import torch

from lightning_attn2_ext import testing


def inputs(dtype=torch.float32, n=70, d=16, e=24, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "q": normal(2, 3, n, d).to(dtype),
        "k": normal(2, 3, n, d).to(dtype),
        "v": normal(2, 3, n, e).to(dtype),
        "slope": torch.tensor([0.0, 0.1, 60.0]),
        "initial_state": normal(2, 3, d, e),
    }
    return tensors, normal(2, 3, n, e).to(dtype), normal(2, 3, d, e)


def test_recurrence_is_the_double_sum():
    x, *_ = inputs()
    q, k, v, slope, state = (t.double() for t in x.values())
    n = q.shape[2]
    i = torch.arange(n, dtype=torch.float64)
    gap = i[:, None] - i[None, :]
    mask = torch.where(gap >= 0, torch.exp(-slope[:, None, None] * gap.clamp(min=0)), 0)
    want = 0.5 * ((q @ k.mT * mask) @ v + torch.exp(-slope[:, None] * (i + 1))[..., None] * (q @ state))
    out, final = testing.recurrence(*list(x.values())[:4], initial_state=x["initial_state"], scale=0.5)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    decays = torch.exp(-slope[:, None] * (n - 1 - i))[..., None]
    want_state = (decays * k).mT @ v + torch.exp(-slope * n)[:, None, None] * state
    torch.testing.assert_close(final, want_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 16, 64, 128])
def test_chunked_is_the_recurrence(chunk):
    x, grad_out, grad_state = inputs(torch.float64)
    x = {n: t.double() for n, t in x.items()}
    want = testing.truth(x, grad_out, grad_state)
    got = testing.gradients(testing.chunked, x, grad_out, grad_state, chunk=chunk)
    for name in want:
        assert testing.error(got[name], want[name]).l2 < 1e-14, name


def test_chunked_packed_is_the_recurrence_packed():
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, 50, 8, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 0, 17, 18, 50], dtype=torch.int32)
    slope = torch.rand(4, 2, generator=generator, dtype=torch.float64)
    got = testing.chunked(q, k, v, slope, cu_seqlens=cu_seqlens, chunk=16)
    want = testing.recurrence(q, k, v, slope, cu_seqlens=cu_seqlens)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bounds_reject_the_known_bug(dtype):
    """One decay too few between chunks, as two serving engines ship it, must be out of bounds even at a mild slope."""
    x, grad_out, grad_state = inputs(dtype, n=256, d=64, e=64)
    x["slope"] = torch.tensor([0.004, 0.06, 0.9])
    want = testing.truth(x, grad_out, grad_state)
    plain = [testing.gradients(testing.chunked, x, grad_out, grad_state, chunk=c) for c in testing.CHUNKS]
    bounds = testing.bounds(want, plain)
    halves = []
    state = x["initial_state"]
    for start in (0, 128):
        part = [x[n][:, :, start : start + 128] for n in ("q", "k", "v")]
        if start:
            state = state * torch.exp(x["slope"])[:, None, None]  # the missing step
        out, state = testing.chunked(*part, x["slope"], initial_state=state)
        halves.append(out)
    assert not testing.error(torch.cat(halves, 2), want["out"]).within(bounds["out"])
    assert testing.error(plain[0]["out"], want["out"]).within(bounds["out"])


def test_nan_is_never_within():
    want = torch.ones(4)
    assert not testing.error(torch.full((4,), torch.nan), want).within(testing.Bound(1e9, 1e9))


def test_a_zero_truth_must_be_hit_exactly():
    exact = {"x": torch.zeros(3)}
    bound = testing.bounds(exact, [{"x": torch.zeros(3)}])["x"]
    assert testing.error(torch.zeros(3), exact["x"]).within(bound)
    assert not testing.error(torch.tensor([0.0, 1e-30, 0.0]), exact["x"]).within(bound)


def test_decode_steps_leaves_the_state_alone():
    x, *_ = inputs(n=5)
    before = x["initial_state"].clone()
    out, final = testing.decode_steps(x["q"], x["k"], x["v"], x["initial_state"], x["slope"])
    assert torch.equal(x["initial_state"], before)
    want, want_state = testing.recurrence(*list(x.values())[:4], initial_state=before)
    assert testing.error(out, want).l2 < 1e-6 and testing.error(final, want_state).l2 < 1e-6


@pytest.mark.parametrize("edges", [None, (0, 5, 5, 70)])
def test_slope_terms_add_up_to_dslope_where_none_cancels(edges):
    """With everything positive all X_t are, and the magnitudes of the terms are the terms."""
    generator = torch.Generator().manual_seed(2)

    def positive(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    num_seqs = 1 if edges is None else len(edges) - 1
    x = {"q": positive(1, 2, 70, 8), "k": positive(1, 2, 70, 8), "v": positive(1, 2, 70, 8)}
    x |= {"slope": torch.tensor([0.01, 0.3], dtype=torch.float64), "initial_state": positive(num_seqs, 2, 8, 8)}
    options = {} if edges is None else {"cu_seqlens": torch.tensor(edges)}
    grad_out, grad_state = positive(1, 2, 70, 8), positive(num_seqs, 2, 8, 8)
    exact = testing.truth(x, grad_out, grad_state, **options)
    total = testing.slope_terms(x, exact, grad_state, **options)
    torch.testing.assert_close(total, -exact["dslope"], rtol=1e-9, atol=0)
