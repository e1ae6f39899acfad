"""What must hold whatever the numbers are: no reference is needed to see these fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case, cases
from tests.support.tolerance import check_backward, check_forward

la2 = torch.ops.la2
CI = settings().derandomize
FEWER = settings(max_examples=15 if CI else 300)

dense = cases(limit=270, dim_limit=64).filter(lambda c: c.lengths is None)
packed = cases(limit=270, dim_limit=64).filter(lambda c: c.lengths)


def cut_rows(x, lo, hi, **changes):
    rows = {n: getattr(x, n)[:, :, lo:hi] for n in ("q", "k", "v", "grad_out")}
    return x.replace(**rows, **changes)


@FEWER
@given(case=dense, data=st.data())
def test_cut_anywhere_and_chain_is_one_call(device, case, data):
    x = case.make(device)
    cuts = sorted(data.draw(st.lists(st.integers(0, case.length), min_size=1, max_size=3), "cuts"))
    edges = list(zip([0, *cuts], [*cuts, case.length], strict=True))
    outs, states = [], [x.initial_state]
    for lo, hi in edges:
        part = cut_rows(x, lo, hi, initial_state=states[-1])
        out, state = la2.forward_with_state(*part.args, **part.options)
        outs.append(out)
        states.append(state)
    whole = la2.forward_with_state(*x.args, **x.options)
    check_forward(x, torch.cat(outs, 2), states[-1], against=whole)

    # Backward through the chain: the gradient of a part's initial state is that of the final state before it.
    grad_state, rows, dslope = x.grad_final_state, [], 0
    for (lo, hi), state in reversed(list(zip(edges, states, strict=False))):
        state = torch.zeros_like(states[-1]) if state is None else state
        part = cut_rows(x, lo, hi, initial_state=state, grad_final_state=grad_state)
        *grads, ds, grad_state = la2.backward(*part.grads, *part.args, **part.options)
        rows.insert(0, grads)
        dslope = dslope + ds
    joined = [torch.cat(column, 2) for column in zip(*rows, strict=True)]
    grads = (*joined, dslope, None if x.initial_state is None else grad_state)
    check_backward(x, grads, against=la2.backward(*x.grads, *x.args, **x.options))


@FEWER
@given(case=packed)
def test_packed_sequences_are_separate_calls(device, case):
    x = case.make(device)
    values, grads = [], []
    ends = x.cu_seqlens.tolist()
    for i, (lo, hi) in enumerate(zip(ends, ends[1:], strict=False)):
        part = cut_rows(x, lo, hi, cu_seqlens=None, grad_final_state=x.grad_final_state[i : i + 1])
        part.initial_state = None if x.initial_state is None else x.initial_state[i : i + 1]
        part.slope = x.slope[i : i + 1] if x.slope is not None and x.slope.dim() == 2 else x.slope
        values.append(la2.forward_with_state(*part.args, **part.options))
        grads.append(la2.backward(*part.grads, *part.args, **part.options))
    outs, states = zip(*values, strict=True)
    separate = torch.cat(outs, 2), torch.cat(states)
    check_forward(x, *la2.forward_with_state(*x.args, **x.options), against=separate)

    dq, dk, dv, dslope, dstate = zip(*grads, strict=True)
    join_slope = torch.cat if x.slope is not None and x.slope.dim() == 2 else lambda ds: sum(ds[1:], ds[0])
    dslope = join_slope(dslope) if x.slope is not None else dslope[0]
    dstate = torch.cat(dstate) if x.initial_state is not None else dstate[0]
    separate = torch.cat(dq, 2), torch.cat(dk, 2), torch.cat(dv, 2), dslope, dstate
    check_backward(x, la2.backward(*x.grads, *x.args, **x.options), against=separate)


@settings(max_examples=10 if CI else 100)
@given(case=cases(limit=33, dim_limit=64).filter(lambda c: c.lengths is None))
def test_decode_steps_are_the_prefill(device, case):
    x = case.make(device)
    state = torch.zeros(case.num_seqs, case.heads, case.key_dim, case.value_dim, device=device)
    if x.initial_state is not None:
        state += x.initial_state
    steps = [
        la2.decode(x.q[:, :, t], x.k[:, :, t], x.v[:, :, t], state, x.slope, scale=x.scale) for t in range(case.length)
    ]
    check_forward(x, torch.stack(steps, 2), state, against=la2.forward_with_state(*x.args, **x.options))


@FEWER
@given(case=cases(limit=200, dim_limit=64))
def test_no_decay_is_plain_linear_attention(device, case):
    """Slopes of zero, no slope at all, and a running sum agree."""
    x = case.make(device).replace(slope=None)
    got = la2.forward_with_state(*x.args, **x.options)
    zero = x.replace(slope=torch.zeros(case.heads, device=device))
    for a, b in zip(got, la2.forward_with_state(*zero.args, **zero.options), strict=True):
        assert torch.equal(a, b)
    ends = [0, x.q.shape[2]] if case.lengths is None else x.cu_seqlens.tolist()
    outs, states = [], []
    for i, (lo, hi) in enumerate(zip(ends, ends[1:], strict=False)):
        q, k, v = (t[:, :, lo:hi].double() for t in (x.q, x.k, x.v))
        sums = torch.cumsum(k[..., :, None] * v[..., None, :], 2)
        start = 0
        if x.initial_state is not None:
            start = (x.initial_state if case.lengths is None else x.initial_state[i : i + 1]).double()
            sums = sums + start[:, :, None]
        outs.append(case.scale * (q[..., None, :] @ sums)[..., 0, :])
        last = sums[:, :, -1] if hi > lo else start + torch.zeros_like(k[..., :1, :].mT @ v[..., :1, :])
        states.append(last if hi > lo else last.expand(1, case.heads, case.key_dim, case.value_dim))
    if states:
        check_forward(x, *got, against=(torch.cat(outs, 2), torch.cat(states)))


@FEWER
@given(case=dense)
def test_time_reversal(device, case):
    """Without states the backward is the forward on exchanged arguments, for dk and dv with time reversed (14)."""
    x = case.make(device).replace(initial_state=None)
    do = x.grad_out

    def flip(t):
        return t.flip(2)

    def form(a, b, c):
        return la2.forward(a, b, c, x.slope, scale=x.scale)

    dq = form(do, x.v, x.k)
    dk = flip(form(flip(x.v), flip(do), flip(x.q)))
    dv = flip(form(flip(x.k), flip(x.q), flip(do)))
    x.grad_final_state = torch.zeros_like(x.grad_final_state)
    got = la2.backward(do, None, *x.args, scale=x.scale)
    check_backward(x, (*got[:3], None, got[4]), against=(dq, dk, dv, got[3], got[4]))


@FEWER
@given(case=dense)
def test_batch_rows_and_heads_do_not_know_their_place(device, case):
    """To the bit: a permutation changes no shape, so no plan, and no arithmetic."""
    x = Case(**(vars(case) | {"layout": "bhnd", "state_layout": "kv"})).make(device)
    rows = torch.randperm(case.num_seqs).to(device)
    heads = torch.randperm(case.heads).to(device)
    moved = x.map(lambda t: t[rows][:, heads])
    if x.slope is not None:
        moved.slope = x.slope[rows][:, heads] if x.slope.dim() == 2 else x.slope[heads]
    values = la2.forward_with_state(*x.args, **x.options)
    for a, b in zip(la2.forward_with_state(*moved.args, **moved.options), values, strict=True):
        assert torch.equal(a, b[rows][:, heads])
    grads, moved_grads = (la2.backward(*y.grads, *y.args, **y.options) for y in (x, moved))
    for i in (0, 1, 2, 4):
        assert torch.equal(moved_grads[i], grads[i][rows][:, heads])
    if x.slope is not None and x.slope.dim() == 2:
        assert torch.equal(moved_grads[3], grads[3][rows][:, heads])


@FEWER
@given(case=cases(limit=270))
def test_storage_does_not_matter(device, case):
    """Strided views give what contiguous copies give, and results take the memory format of q, k and v."""
    x = case.make(device)
    plain = x.map(lambda t: t.contiguous())
    before = [t.clone() for t in (x.q, x.k, x.v)]
    out, state = la2.forward_with_state(*x.args, **x.options)
    check_forward(x, out, state, against=la2.forward_with_state(*plain.args, **plain.options))
    grads = la2.backward(*x.grads, *x.args, **x.options)
    check_backward(x, grads, against=la2.backward(*plain.grads, *plain.args, **plain.options))
    for got, like in ((out, x.q), (grads[0], x.q), (grads[1], x.k), (grads[2], x.v)):
        heads_inside = like.stride(1) < like.stride(2)
        assert (got.transpose(1, 2) if heads_inside else got).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, (x.q, x.k, x.v), strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_minus_zero_is_no_decay(device, dtype):
    """As -log(1.) is. Long enough for segments of many chunks."""
    x = Case(heads=2, length=3000, key_dim=64, value_dim=64, dtype=dtype).make(device)
    x.slope = torch.zeros(2, device=device)
    y = x.replace(slope=-x.slope)
    assert y.slope.signbit().all()
    for one, two in zip(everything(x), everything(y), strict=True):
        assert torch.equal(one, two)


def everything(x):
    out = torch.ops.la2.forward_with_state(*x.args, **x.options)
    return *out, *torch.ops.la2.backward(*x.grads, *x.args, **x.options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("lengths", (None, (3, 0, 200, 97)))
def test_every_run_gives_the_same_bits(device, dtype, lengths):
    x = Case(heads=5, batch=2, length=300, lengths=lengths, dtype=dtype, slope="mixed").make(device)

    def run():
        return *la2.forward_with_state(*x.args, **x.options), *la2.backward(*x.grads, *x.args, **x.options)

    first, threads = run(), torch.get_num_threads()
    try:
        for n in (1, 2, 3, threads):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{n} threads"
    finally:
        torch.set_num_threads(threads)
