"""Nothing leaks: every element of a result is written, and what is not a number stays where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case, cases
from tests.support.tolerance import check_backward, check_forward

la2 = torch.ops.la2
CI = settings().derandomize
NAN = float("nan")

POISONED = (
    Case(heads=3, batch=2, length=37, key_dim=24, value_dim=40, slope="mixed", layout="bnhd"),
    Case(heads=2, batch=1, length=129, key_dim=8, value_dim=8, dtype=torch.bfloat16, state_layout="vk"),
    Case(heads=2, lengths=(0, 5, 0, 66, 0), dtype=torch.float16, slope="mixed", slope_per_seq=True),
    Case(heads=2, lengths=(1,), state_layout=None),
    Case(heads=2, lengths=(0, 0), slope="none"),
    Case(heads=2, batch=3, length=0, slope_per_seq=True),
)


def check_all(case, device, prepare=lambda case: None):
    x = case.make(device)
    prepare(case)
    check_forward(x, *la2.forward_with_state(*x.args, **x.options))
    prepare(case)
    check_backward(x, la2.backward(*x.grads, *x.args, **x.options))
    state = x.initial_state.clone() if x.initial_state is not None else None
    if state is not None and case.length and case.lengths is None:
        prepare(case)
        indices = torch.full((case.batch,), -1, dtype=torch.int32, device=device)
        step = [t[:, :, 0] for t in (x.q, x.k, x.v)]
        assert not la2.decode(*step, state, x.slope, state_indices=indices).any()
        assert torch.equal(state, x.initial_state)


def test_results_are_written_whole_on_the_cpu():
    """glibc fills new memory with 0x7f: huge as float32 and bfloat16, not a number as float16."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from tests.ops.test_memory import POISONED, check_all\n"
        "assert torch.empty(1000).gt(1e38).all(), 'memory is not poisoned'\n"
        "for case in POISONED: check_all(case, 'cpu')\n"
    )
    env = os.environ | {"MALLOC_PERTURB_": str(0x80), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("case", POISONED, ids=range(len(POISONED)))
def test_results_are_written_whole_on_the_gpu(case):
    """The caching allocator hands freed blocks out again: free blocks full of NaN first."""

    def poison(case):
        blocks = [torch.full((size,), NAN, device="cuda") for size in (1 << 24, 1 << 20, *[1 << 17] * 64, *[256] * 256)]
        torch.cuda.synchronize()
        del blocks

    check_all(case, "cuda", poison)


def spoil(x, where, value):
    """A copy of the inputs with `value` in one (sequence, head) of each of q, k, v, grad_out and both states."""
    seq, head, row = where
    spoiled = x.map(lambda t: t.clone())
    batch, lo, hi = seq, 0, x.q.shape[2]
    if x.cu_seqlens is not None:
        batch, lo, hi = 0, *x.cu_seqlens[seq : seq + 2].tolist()
    for t in (spoiled.q, spoiled.k, spoiled.v, spoiled.grad_out):
        if hi > lo:
            t[batch, head, lo + row % (hi - lo)] = value
    for t in (spoiled.initial_state, spoiled.grad_final_state):
        if t is not None:
            t[seq, head] = value
    return spoiled, (batch, slice(lo, hi))


@settings(max_examples=20 if CI else 400)
@given(case=cases(limit=200, dim_limit=48), data=st.data())
def test_bad_numbers_stay_in_their_head_and_sequence(device, case, data):
    """To the bit, also for the sequence that shares a chunk-sized window with the spoiled one."""
    if not case.num_seqs:
        return
    where = [data.draw(st.integers(0, n - 1), name) for n, name in ((case.num_seqs, "seq"), (case.heads, "head"))]
    where.append(data.draw(st.integers(0, 400), "row"))
    x = case.make(device)
    spoiled, (batch, rows) = spoil(x, where, data.draw(st.sampled_from((NAN, float("inf"))), "value"))

    def run(y):
        return *la2.forward_with_state(*y.args, **y.options), *la2.backward(*y.grads, *y.args, **y.options)

    clean = run(x)
    for i, (a, b) in enumerate(zip(clean, run(spoiled), strict=True)):
        if a.shape == (0,):
            continue
        elsewhere = torch.ones(a.shape, dtype=torch.bool, device=device)
        if i in (0, 2, 3, 4):  # out, dq, dk, dv
            elsewhere[batch, where[1], rows] = False
        elif i == 5 and a.dim() == 1:  # a slope that all sequences share
            elsewhere[where[1]] = False
        else:
            elsewhere[where[0], where[1]] = False
        assert torch.equal(a[elsewhere], b[elsewhere]), f"result {i} changed elsewhere"
        if i == 1:
            assert not b[where[0], where[1]].isfinite().all() or x.initial_state is None


@pytest.mark.parametrize("slope", (50.0, 1e4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_steep_slopes_multiply_no_infinity_by_zero(device, slope, dtype):
    """Past tokens vanish exactly at 1e4; powers of 1/lambda would be infinite and their products NaN."""
    x = Case(heads=2, length=300, dtype=dtype).make(device)
    x.slope = torch.full((2,), slope, device=device)
    out, state = la2.forward_with_state(*x.args, **x.options)
    grads = la2.backward(*x.grads, *x.args, **x.options)
    assert all(torch.isfinite(t).all() for t in (out, state, *grads))
    own = (x.q.double() * x.k.double()).sum(-1, keepdim=True) * x.v.double()
    assert (out.double() - own).norm() <= 4 * torch.finfo(dtype).eps * own.norm()
    if slope == 1e4:
        assert not grads[3].any() and not grads[4].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_decay_sums_exactly(device, dtype):
    """Small whole numbers have exact sums, so with a slope of zero not one bit may differ."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randint(-1, 2, (1, 2, 200, 16), generator=generator).to(device, dtype) for _ in range(3))
    out, state = la2.forward_with_state(q, k, v, torch.zeros(2, device=device))
    sums = torch.cumsum(k.double()[..., :, None] * v.double()[..., None, :], 2)
    assert torch.equal(state.double(), sums[:, :, -1])
    if dtype == torch.float32:
        assert torch.equal(out.double(), (q.double()[..., None, :] @ sums)[..., 0, :])
