"""What only a GPU can show: every kernel of every plan, streams, graphs, memory, repeatability, errors.

The tests marked `sanitize` are tiny and launch every CUDA kernel there is; their truth is computed on the CPU, so that
compute-sanitizer (tests/record.py) has next to nothing but these kernels to look at.
"""

import os
import subprocess
import sys
import threading

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case, accumulation_dtype
from tests.support.pools import pool_of
from tests.support.tolerance import check_backward, check_forward, forward_truth, gradient_truth
from triton_ref import naive

la2 = torch.ops.la2
pytestmark = pytest.mark.gpu

CUDA = "cuda"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HALVES = (BF16, FP16)
NAN = float("nan")
GIB = 1 << 30


def run(x, need_dslope=True):
    """(out, final state, dq, dk, dv, dslope or None, dinitial state)"""
    dq, dk, dv, dslope, dstate = la2.backward(*x.grads, *x.args, **x.options, need_dslope=need_dslope)
    return *la2.forward_with_state(*x.args, **x.options), dq, dk, dv, dslope if need_dslope else None, dstate


def families(dtype):
    """The kernel families that this GPU has for a dtype. Hopper's has no slope gradient."""
    if dtype not in HALVES:
        return ("simt",)
    return ("sm80", "sm90") if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else ("sm80",)


needs_hopper = pytest.mark.skipif(
    "sm90" not in families(torch.bfloat16), reason="needs a GPU of compute capability 9.0 that torch can use"
)


def check(x, got=None):
    got = run(x) if got is None else got
    check_forward(x, *got[:2])
    check_backward(x, got[2:])


def assert_equal(got, want):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i} differs in {int((a != b).sum())} of {a.numel()} elements"


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def alibi(heads, device=CUDA):
    return torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)


# ---- every plan


def has_slice(dtype, dims, size):
    """Whether both launches of a backward have such a kernel (csrc/core/plan.cpp)."""
    if dtype == FP32:
        return size == 64
    if dtype == FP64:
        return size == 32
    return size == 64 or size == 128 and max(dims) <= 128


DIMS = ((64, 64), (64, 128), (128, 64), (128, 128), (256, 64), (128, 256), (40, 24), (8, 136))
SLICES = (32, 64, 128)
PLANS = [(BF16, dims, size) for dims in DIMS for size in SLICES if has_slice(BF16, dims, size)]
PLANS += [(FP16, dims, size) for dims in ((128, 128), (256, 256)) for size in SLICES if has_slice(FP16, dims, size)]
PLANS += [(FP32, dims, 64) for dims in ((64, 64), (128, 128), (256, 256), (40, 136))]
PLANS += [(FP64, dims, 32) for dims in ((64, 64), (128, 40), (256, 256))]
FAMILY = {BF16: "sm80", FP16: "sm80", FP32: "simt", FP64: "simt"}


def plan_id(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("segments", (1, 2, 3, 7))
@pytest.mark.parametrize("dtype, dims, size", PLANS, ids=plan_id)
def test_every_plan(monkeypatch, dtype, dims, size, segments):
    """Dense and packed. 891 tokens make exactly as many segments as asked for, none of whole chunks at its end."""
    monkeypatch.setenv("LA2_PLAN", f"family={FAMILY[dtype]},slice={size},segments={segments}")
    common = {"heads": 3, "key_dim": dims[0], "value_dim": dims[1], "dtype": dtype, "scale": 0.5}
    dense = Case(batch=2, length=891, slope_per_seq=True, state_layout="vk", **common).make(CUDA)
    dense.slope = torch.tensor([[0.0, 0.01, 0.3], [0.1, 0.02, 2.0]], dtype=dense.slope.dtype, device=CUDA)
    check(dense)
    packed = Case(lengths=(0, 130, 1, 0, 449, 64, 247), layout="bnhd", **common).make(CUDA)
    packed.slope = torch.tensor([0.005, 0.05, 0.5], dtype=packed.slope.dtype, device=CUDA)
    check(packed)


HOPPER_DIMS = (*DIMS, (96, 96), (192, 192), (256, 256))


@needs_hopper
@pytest.mark.parametrize(
    "plan", ("segments=1", "segments=2", "segments=3", "segments=7", "slice=64", "slice=64,cluster=1")
)
@pytest.mark.parametrize("dims", HOPPER_DIMS, ids=plan_id)
@pytest.mark.parametrize("dtype", HALVES, ids=plan_id)
def test_every_hopper_plan(monkeypatch, dtype, dims, plan):
    """Dense and packed as above, and the portable kernels beside it on the same numbers."""
    common = {"heads": 3, "key_dim": dims[0], "value_dim": dims[1], "dtype": dtype, "scale": 0.5}
    dense = Case(batch=2, length=891, slope_per_seq=True, state_layout="vk", **common).make(CUDA)
    dense.slope = torch.tensor([[0.0, 0.01, 0.3], [0.1, 0.02, 2.0]], dtype=dense.slope.dtype, device=CUDA)
    packed = Case(lengths=(0, 130, 1, 0, 449, 64, 247), layout="bnhd", **common).make(CUDA)
    packed.slope = torch.tensor([0.005, 0.05, 0.5], dtype=packed.slope.dtype, device=CUDA)
    for x in (dense, packed):
        monkeypatch.setenv("LA2_PLAN", f"family=sm90,{plan}")
        got = run(x, need_dslope=False)
        check(x, got)
        assert_equal([t for t in run(x, need_dslope=False) if t is not None], [t for t in got if t is not None])
        monkeypatch.setenv("LA2_PLAN", "family=sm80")
        check(x, run(x, need_dslope=False))


@needs_hopper
def test_neighbours_of_packed_sequences_do_not_leak(monkeypatch):
    """A chunk is copied whole: what stands behind the end of a sequence is its neighbour, here NaN and infinities."""
    monkeypatch.setenv("LA2_PLAN", "family=sm90")
    x = Case(heads=2, lengths=(70, 70, 70), key_dim=128, value_dim=128, dtype=BF16, state_layout=None).make(CUDA)
    alone = x.replace(
        cu_seqlens=torch.tensor([0, 70], dtype=torch.int32, device=CUDA),
        **{n: getattr(x, n)[:, :, 70:140].clone() for n in ("q", "k", "v", "grad_out")},
        grad_final_state=x.grad_final_state[1:2],
    )
    for t in (x.q, x.k, x.v, x.grad_out):
        t[:, :, :70] = float("inf")
        t[:, :, 140:] = NAN
    got, want = run(x, need_dslope=False), run(alone, need_dslope=False)
    for i in (0, 2, 3, 4):
        assert torch.equal(got[i][:, :, 70:140], want[i]), i
    assert torch.equal(got[1][1], want[1][0])


@pytest.mark.parametrize("expanded", ("k", "v", "grad_out"))
def test_expanded_operands(expanded):
    """One head's rows for all heads: a stride of 0, which the copy engine's maps do not promise to take."""
    x = Case(heads=4, batch=2, length=200, key_dim=128, value_dim=128, dtype=BF16).make(CUDA)
    setattr(x, expanded, getattr(x, expanded)[:, :1].expand(-1, 4, -1, -1))
    check(x, run(x, need_dslope=False))


@needs_hopper
@pytest.mark.parametrize("segments", (2, 5))
def test_windows_of_steep_heads(monkeypatch, segments):
    """The state pass leaves out what has decayed under 2^-40; neighbouring heads decay from not at all to at once."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm90,segments={segments}")
    x = Case(heads=6, length=4096, key_dim=128, value_dim=128, dtype=BF16).make(CUDA)
    x.slope = torch.tensor([0.0, 1e-4, 0.01, 0.05, 0.5, 50.0], device=CUDA)
    check(x, run(x, need_dslope=False))


def test_forced_plans_are_taken(monkeypatch):
    """The workspace shows it: a state for each segment. A plan that cannot be says so."""
    x = Case(heads=4, length=7 * 128, key_dim=128, value_dim=128, dtype=BF16).make(CUDA)

    def peak(plan):
        monkeypatch.setenv("LA2_PLAN", plan)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        la2.forward(*x.args, **x.options)
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before  # no rounding to blocks

    state = 4 * 128 * 128 * 4
    if "sm90" in families(BF16):
        assert peak("family=sm90,segments=7") - peak("family=sm90,segments=1") == 7 * state
    assert peak("segments=7") - peak("segments=1") == 7 * state
    assert peak("segments=3") - peak("segments=1") == 3 * state
    monkeypatch.setenv("LA2_PLAN", "family=simt")
    with pytest.raises(RuntimeError, match="LA2_PLAN: family simt has no kernels for bf16"):
        la2.forward(*x.args, **x.options)


@pytest.mark.parametrize("plan, segment_len", (("segments=1", 2048), ("segments=3", 704), ("segments=7", 320)))
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_rows_at_boundaries_are_as_accurate_as_others(monkeypatch, dtype, plan, segment_len):
    """A row behind a boundary lives on the state alone, so a state that is off by a token or rounded too much shows
    there and drowns in the norm of all rows. Forward results are fresh at the left edge, dk and dv at the right."""
    monkeypatch.setenv("LA2_PLAN", plan)
    length = 2048
    x = Case(heads=4, batch=8, length=length, key_dim=128, value_dim=128, dtype=dtype, layout="bnhd").make(CUDA)
    x.slope = torch.tensor([0.0, 0.005, 0.02, 0.1], device=CUDA)
    got = run(x)
    chunks = range(64, length, 64)
    segments = range(segment_len, length, segment_len)
    edges = {"segment": segments, "chunk": [r for r in chunks if r not in segments]}

    # Each row at an edge by itself against the derived bound.
    x.windows = [(r + d, r + d + 1) for r in chunks for d in (-1, 0)]
    check_forward(x, *got[:2])
    x.windows = None

    truth = gradient_truth(x)
    for name, result in zip(("out", "dq", "dk", "dv"), (got[0], *got[2:5]), strict=True):
        want = truth[name]
        # Of a row, over the batch: one row alone may be small by chance.
        errors = (result.double() - want).square().sum((0, 3)) / want.square().sum((0, 3))  # [H, N]
        inner = torch.ones(length, dtype=torch.bool, device=CUDA)
        inner[:64] = inner[-64:] = False  # little has been summed there yet
        for r in chunks:
            inner[r - 1 : r + 1] = False
        usual = errors[:, inner].mean(1).sqrt()
        for kind, rows in edges.items():
            for offset in (-1, 0):
                at = [r + offset for r in rows if 64 <= r + offset < length - 64]
                if at:
                    there = errors[:, at].mean(1).sqrt()
                    assert (there <= 1.5 * usual).all(), f"{name}, {kind}{offset:+d}: {there} against {usual}"


@pytest.mark.parametrize("length", (1, 63, 64, 65, 127, 4097))
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32, FP64))
def test_lengths_and_slopes(dtype, length):
    """Neighbouring heads are as unlike as slopes can be."""
    x = Case(heads=4, length=length, key_dim=64, value_dim=64, dtype=dtype).make(CUDA)
    x.slope = torch.tensor([0.0, 1e4, 1e-6, 50.0], dtype=x.slope.dtype, device=CUDA)
    check(x)


PACKED = (0, 3000, 1, 64, 0, 1217, 63, 65, 2999, 128, 0, 500, 7, 2048, 31, 129, 1000, 0, 333, 256)


def separately(x):
    """The packed problem sequence by sequence: values and gradients, joined."""
    ends, results = x.cu_seqlens.tolist(), []
    for i, (lo, hi) in enumerate(zip(ends, ends[1:], strict=False)):
        rows = {n: getattr(x, n)[:, :, lo:hi] for n in ("q", "k", "v", "grad_out")}
        seqs = {n: getattr(x, n)[i : i + 1] for n in ("slope", "initial_state", "grad_final_state")}
        results.append(run(x.replace(cu_seqlens=None, **rows, **seqs)))
    return [torch.cat(column, 2 if i in (0, 2, 3, 4) else 0) for i, column in enumerate(zip(*results, strict=True))]


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_packed_sequences_are_separate_calls(monkeypatch, dtype, index_dtype):
    assert len(PACKED) == 20
    case = Case(heads=2, lengths=PACKED, key_dim=64, value_dim=128, dtype=dtype, slope_per_seq=True)
    x = Case(**(vars(case) | {"index_dtype": index_dtype})).make(CUDA)
    x.slope = torch.linspace(0.001, 0.5, 40, device=CUDA).view(20, 2)
    free = run(x)
    monkeypatch.setenv("LA2_PLAN", "slice=64,segments=1")  # each sequence in one piece: the same arithmetic
    whole, separate = run(x), separately(x)
    for i in (0, 1, 2, 3, 4, 6):
        assert torch.equal(whole[i], separate[i]), f"result {i}"
    torch.testing.assert_close(whole[5], separate[5], rtol=1e-6, atol=0)
    check_forward(x, *free[:2], against=separate[:2])
    check_backward(x, free[2:], against=separate[2:])


# ---- error bounds that the documentation promises


def silu_problem(dtype):
    x = Case(heads=8, batch=2, length=2048, key_dim=128, value_dim=128, dtype=FP32, state_layout=None).make(CUDA)
    x.slope = alibi(8)
    x.q, x.k, x.v = (torch.nn.functional.silu(t).to(dtype) for t in (x.q, x.k, x.v))
    x.grad_out = x.grad_out.to(dtype)
    x.grad_final_state = torch.zeros_like(x.grad_final_state)
    return x


NAMES = ("out", "dq", "dk", "dv")


def four_results(x):
    out = la2.forward(*x.args, **x.options)
    grads = la2.backward(x.grad_out, None, *x.args, **x.options, need_dslope=False)[:3]
    return dict(zip(NAMES, (out, *grads), strict=True))


@pytest.mark.parametrize("family", families(BF16))
def test_error_of_bfloat16(monkeypatch, family):
    monkeypatch.setenv("LA2_PLAN", f"family={family}")
    x = silu_problem(BF16)
    truth, got = gradient_truth(x), four_results(x)
    errors = {name: relative_error(got[name], truth[name]) for name in NAMES}
    assert errors["out"] <= 1.9e-3 and all(errors[n] <= 2.1e-3 for n in NAMES[1:]), errors


@needs_hopper
def test_error_of_hopper_kernels(monkeypatch):
    """Any head by itself, slopes over (0, 1), and the final state."""
    monkeypatch.setenv("LA2_PLAN", "family=sm90")
    x = silu_problem(BF16)
    heads = [relative_error(a[:, h], b[:, h]) for a, b in _pairs(x) for h in range(8)]
    assert max(heads) <= 2.4e-3, heads
    x.slope = torch.linspace(0.05, 0.95, 8, device=CUDA)
    errors = [relative_error(a, b) for a, b in _pairs(x)]
    assert errors[0] <= 2.1e-3 and max(errors[1:]) <= 2.3e-3, errors
    state = la2.forward_with_state(*x.args, **x.options)[1]
    assert relative_error(state, gradient_truth(x)["final_state"]) <= 1e-3


def _pairs(x):
    truth, got = gradient_truth(x), four_results(x)
    return [(got[name], truth[name]) for name in NAMES]


def test_error_of_float32():
    x = silu_problem(FP32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        options = x.options | {"dtype": FP32, "chunk": 64}
        plain = [naive.chunked(*x.args, **options)[0], *naive.backward_chunked(*x.grads, *x.args, **options)[:3]]
    finally:
        torch.set_float32_matmul_precision(precision)
    truth, got = gradient_truth(x), four_results(x)
    for name, p in zip(NAMES, plain, strict=True):
        error, yardstick = relative_error(got[name], truth[name]), relative_error(p, truth[name])
        assert error <= 2 * yardstick and error <= 3e-6, f"{name}: {error:.2e}, plain PyTorch {yardstick:.2e}"


@pytest.mark.parametrize("plan", ("segments=1", "segments=3"))
def test_float16_states_beyond_its_range(monkeypatch, plan):
    """States are float32; one of 10^6 has no float16. Results fit, for q and the cotangent are small."""
    monkeypatch.setenv("LA2_PLAN", plan)
    x = Case(heads=2, length=4096, key_dim=64, value_dim=64, dtype=FP16, state_layout=None).make(CUDA)
    x.slope = torch.zeros(2, device=CUDA)
    for name in ("k", "v"):
        setattr(x, name, (16 + getattr(x, name)).half())
    x.q, x.grad_out = (x.q * 2.0**-12).half(), (x.grad_out * 2.0**-12).half()
    x.grad_final_state = torch.zeros_like(x.grad_final_state)
    truth = gradient_truth(x)
    assert truth["final_state"].abs().amax() > 10 * 65504
    got = run(x)
    assert all(torch.isfinite(t).all() for t in got)
    for name, t in zip(("out", "final_state", "dq", "dk", "dv"), got, strict=False):
        limit = 1e-6 if name == "final_state" else 2e-3
        assert relative_error(t, truth[name]) <= limit, name


# ---- more than 2^31 elements

BIG = (64, 300_000, 128)  # H, N, D: 2.46e9 elements, 4.6 GiB in bfloat16
REACH = 2048  # tokens: exp(-0.05 * 2048) is 10^-45


def big_rows(layout):
    heads, length, dim = BIG
    shape = (1, heads, length, dim) if layout == "bhnd" else (1, length, heads, dim)
    t = torch.nn.functional.silu(torch.randn(shape, dtype=BF16, device=CUDA), inplace=True)
    assert t.numel() > 2**31
    return t if layout == "bhnd" else t.transpose(1, 2)


@pytest.fixture
def room():
    """Needs `gib` GiB of free GPU memory; leaves none cached."""

    def need(gib):
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / GIB
        if free < gib:
            pytest.skip(f"{free:.0f} GiB of GPU memory are free, this needs {gib}")

    yield need
    torch.cuda.empty_cache()


def spots():
    """Where to look: (heads, first token, token behind the last): both ends, and about element 2^31."""
    _, length, dim = BIG
    crossing = 2**31 // dim
    head, token = crossing // length, crossing % length
    assert REACH < token < length - REACH
    yield [0, 1, 63], 0, 128
    yield [0, head, 63], length - 128, length
    yield [head - 1, head, 62], token - 64, token + 64  # [H, N]
    yield [0, 31, 63], crossing // 64 - 64, crossing // 64 + 64  # [N, H]


def window(q, k, v, slope, heads, lo, hi, **more):
    """The problem that surrounds tokens [lo, hi) of some heads, as far as decay lets anything through."""
    first, last = max(0, lo - REACH), min(q.shape[2], hi + REACH)
    x = Case(heads=len(heads), length=1, key_dim=128, value_dim=128, dtype=BF16, state_layout=None).make(CUDA)
    x.grad_final_state = torch.zeros_like(x.grad_final_state)
    cut = {n: t[:, heads, first:last] for n, t in {"q": q, "k": k, "v": v, "grad_out": v, **more}.items()}
    return x.replace(slope=slope[heads], windows=[(lo - first, hi - first)], **cut), slice(first, last)


@pytest.mark.parametrize("layout", ("bhnd", "bnhd"))
def test_more_elements_than_32_bits_count(room, layout):
    room(40)
    torch.manual_seed(0)
    q, k, v = (big_rows(layout) for _ in range(3))
    slope = torch.full((BIG[0],), 0.05, device=CUDA)
    out, state = la2.forward_with_state(q, k, v, slope)
    for heads, lo, hi in spots():
        x, rows = window(q, k, v, slope, heads, lo, hi)
        check_forward(x, out[:, heads, rows], state[:, heads] if hi == BIG[1] else None)


@pytest.mark.parametrize("layout", ("bhnd", "bnhd"))
def test_gradients_of_more_elements_than_32_bits_count(room, layout):
    room(60)
    torch.manual_seed(0)
    q, k, v, grad_out = (big_rows(layout) for _ in range(4))
    slope = torch.full((BIG[0],), 0.05, device=CUDA)
    grads = la2.backward(grad_out, None, q, k, v, slope)
    assert torch.isfinite(grads[3]).all()
    for heads, lo, hi in spots():
        x, rows = window(q, k, v, slope, heads, lo, hi, grad_out=grad_out)
        check_backward(x, (*(g[:, heads, rows] for g in grads[:3]), None, None))


# ---- graphs, streams, threads

LIVE = {
    "bf16": Case(heads=4, batch=2, length=700, key_dim=128, value_dim=128, dtype=BF16),
    "bf16 packed": Case(heads=4, lengths=(300, 0, 1, 900), key_dim=64, value_dim=128, dtype=BF16, layout="bnhd"),
    "fp32": Case(heads=2, batch=2, length=300, key_dim=64, value_dim=40, dtype=FP32),
}
LIVE_PLANS = ("segments=1", "segments=3")


def decode_problem(dtype=BF16, rows=5, slots=9, heads=4, dims=(64, 128), state_layout="kv"):
    case = Case(heads=heads, batch=slots, length=1, key_dim=dims[0], value_dim=dims[1], dtype=dtype)
    x = Case(**(vars(case) | {"state_layout": state_layout})).make(CUDA)
    x.slope = alibi(heads).to(accumulation_dtype(dtype))
    tokens = [t[:rows, :, 0] for t in (x.q, x.k, x.v)]
    return tokens, x.initial_state, x.slope


def refill(x, seed):
    """New numbers in the same memory."""
    torch.manual_seed(seed)
    for t in (x.q, x.k, x.v, x.grad_out, x.initial_state, x.grad_final_state):
        t.normal_()
    x.slope.uniform_(0.01, 1)


@pytest.mark.parametrize("plan", LIVE_PLANS)
@pytest.mark.parametrize("case", LIVE.values(), ids=LIVE)
def test_graph_of_forward_and_backward(monkeypatch, case, plan):
    """Captured once, replayed on new contents (boundaries too), to the bit what a call gives."""
    monkeypatch.setenv("LA2_PLAN", plan)
    x = case.make(CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    for seed in range(3):
        refill(x, seed)
        if x.cu_seqlens is not None:
            x.cu_seqlens[1:-1] = torch.tensor([100 * seed, 100 * seed + 7, 1000 - seed], device=CUDA)
        graph.replay()
        assert_equal(captured, run(x))


def test_graph_of_decode(monkeypatch):
    tokens, pool, slope = decode_problem()
    indices = torch.tensor([3, -1, 8, 0, 5], dtype=torch.int32, device=CUDA)
    la2.decode(*tokens, pool.clone(), slope, state_indices=indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = la2.decode(*tokens, pool, slope, state_indices=indices)
    twin = pool.clone()
    for seed, slots in enumerate(([3, -1, 8, 0, 5], [1, 2, 3, 4, 0], [-1, -1, -1, 7, -1])):
        torch.manual_seed(seed)
        for t in tokens:
            t.normal_()
        indices.copy_(torch.tensor(slots, dtype=torch.int32))
        graph.replay()
        assert_equal([out, pool], [la2.decode(*tokens, twin, slope, state_indices=indices), twin])
    assert not out[0].any() and out[3].any()


def test_work_goes_to_the_current_stream():
    """Inputs arrive late on another stream: whoever does not queue behind them reads what was there before."""
    x = LIVE["bf16"].make(CUDA)
    fresh = Case(**(vars(LIVE["bf16"]) | {"seed": 1})).make(CUDA)
    want, stale = run(fresh), run(x)
    tokens, pool, slope = decode_problem()
    new_tokens = [t.flip(0).contiguous() for t in tokens]
    want_pool = pool.clone()
    want_step = la2.decode(*new_tokens, want_pool, slope, state_indices=torch.arange(5, device=CUDA))
    arange = torch.arange(5, device=CUDA)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for name in ("q", "k", "v", "grad_out", "initial_state", "grad_final_state"):
            getattr(x, name).copy_(getattr(fresh, name))
        for t, new in zip(tokens, new_tokens, strict=True):
            t.copy_(new)
        got = run(x)
        step = la2.decode(*tokens, pool, slope, state_indices=arange)
        assert not stream.query(), "the stream ran dry: this shows nothing"
    stream.synchronize()
    assert not torch.equal(stale[0], want[0])
    assert_equal(got, want)
    assert_equal([step, pool], [want_step, want_pool])


def test_second_thread():
    problems = [case.make(CUDA) for case in LIVE.values()]
    want = [run(x) for x in problems]
    torch.cuda.synchronize()
    got, failures = {}, []

    def work(name):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    got[name] = [run(x) for x in problems]
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for i in range(2):
        for a, b in zip(got[i], want, strict=True):
            assert_equal(a, b)


def test_two_streams_at_once(monkeypatch):
    """Workspaces and dots of calls in flight together are their own."""
    monkeypatch.setenv("LA2_PLAN", "segments=3")
    problems = [Case(**(vars(LIVE["bf16"]) | {"seed": i})).make(CUDA) for i in range(2)]
    want = [run(x) for x in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for x, stream, kept in zip(problems, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(run(x))
    torch.cuda.synchronize()
    for kept, expected in zip(results, want, strict=True):
        for got in kept:
            assert_equal(got, expected)


def test_nothing_waits_for_the_gpu():
    """Not through torch, which would raise, nor behind its back: the calls return while the GPU sleeps."""
    problems = [case.make(CUDA) for case in LIVE.values()]
    leaves = [t.detach().clone().requires_grad_() for t in problems[0].args]
    tokens, pool, slope = decode_problem()
    indices = torch.tensor([3, -1, 8, 0, 5], dtype=torch.int32, device=CUDA)

    def everything():
        for x in problems:
            run(x)
        out = la2.forward(*leaves)
        torch.autograd.grad(out, leaves, out.detach())
        la2.decode(*tokens, pool, slope, state_indices=indices)

    everything()  # loads kernels
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    asleep.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
        waited = asleep.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "a call returned only when the GPU was done"


# ---- repeatability and memory


@pytest.mark.parametrize("plan", LIVE_PLANS)
@pytest.mark.parametrize("case", LIVE.values(), ids=LIVE)
def test_hundred_runs_give_the_same_bits(monkeypatch, case, plan):
    monkeypatch.setenv("LA2_PLAN", plan)
    x = case.make(CUDA)
    first = run(x)
    for _ in range(100):
        assert_equal(run(x), first)


def poison():
    """Every block that the caching allocator hands out next is full of NaN."""
    torch.cuda.empty_cache()
    blocks = [torch.full((n,), NAN, device=CUDA) for n in (1 << 26, *[5 << 20] * 8, *[1 << 17] * 64, *[128] * 512)]
    torch.cuda.synchronize()
    del blocks


@pytest.mark.parametrize("plan", LIVE_PLANS)
@pytest.mark.parametrize(
    "case",
    (
        *LIVE.values(),
        Case(heads=3, batch=2, length=1000, key_dim=40, value_dim=24, dtype=BF16, slope_per_seq=True),
        Case(heads=2, lengths=(0, 900, 0), key_dim=256, value_dim=64, dtype=FP16),
        Case(heads=2, length=500, key_dim=24, value_dim=136, dtype=FP64, state_layout="vk"),
    ),
    ids=str,
)
def test_nothing_is_read_before_it_is_written(monkeypatch, case, plan):
    """Results and workspaces lie in memory full of NaN; all of the call's memory came from there."""
    monkeypatch.setenv("LA2_PLAN", plan)
    x = case.make(CUDA)
    want = run(x)
    for _ in range(2):
        poison()
        segments = torch.cuda.memory_stats()["segment.all.allocated"]
        got = run(x)
        assert torch.cuda.memory_stats()["segment.all.allocated"] == segments
        assert_equal(got, want)
    check(x, want)


def off_by_one(t):
    """The same values at a storage offset of one element."""
    if t is None:
        return None
    moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
    return moved.copy_(t)


@pytest.mark.parametrize("plan", LIVE_PLANS)
@pytest.mark.parametrize("case", LIVE.values(), ids=LIVE)
def test_misaligned_tensors(monkeypatch, case, plan):
    monkeypatch.setenv("LA2_PLAN", plan)
    x = Case(**(vars(case) | {"layout": "bhnd"})).make(CUDA)
    moved = x.map(off_by_one).replace(slope=off_by_one(x.slope), cu_seqlens=off_by_one(x.cu_seqlens))
    assert moved.q.data_ptr() % 16 and moved.initial_state.data_ptr() % 16
    got, want = run(moved), run(x)
    check_forward(x, *got[:2], against=want[:2])
    check_backward(x, got[2:], against=want[2:])
    odd = Case(**(vars(case) | {"layout": "strided"})).make(CUDA)  # rows that begin 8 bytes into a 16-byte unit
    check(odd)


@pytest.mark.parametrize("dtype", (BF16, FP32, FP64))
@pytest.mark.parametrize("state_layout", ("kv", "vk"))
def test_misaligned_decode(dtype, state_layout):
    tokens, pool, slope = decode_problem(dtype, rows=9, state_layout=state_layout)
    moved = off_by_one(pool) if state_layout == "kv" else off_by_one(pool.mT).mT
    twin = pool.clone()
    out = la2.decode(*(off_by_one(t) for t in tokens), moved, off_by_one(slope))
    want = la2.decode(*tokens, twin, slope)
    assert torch.equal(moved, twin)  # one multiply and one add an element: the order of sums is out's alone
    # Two orders of a sum of D products differ by no more than 2 D roundings of its terms, and once each in the result.
    q = tokens[0].to(twin.dtype)
    terms = torch.einsum("bhd,bhde->bhe", q.abs(), twin[: len(q)].abs())
    limit = 2 * q.shape[-1] * torch.finfo(twin.dtype).eps * terms + torch.finfo(dtype).eps * want.abs()
    assert ((out.to(twin.dtype) - want.to(twin.dtype)).abs() <= limit).all()


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("state_layout", ("kv", "vk", "padded"))
@pytest.mark.parametrize("dtype", (BF16, FP64))
def test_decode_writes_to_its_slots_alone(dtype, state_layout, index_dtype):
    """Indices outside of the pool, on either side, are padding on a GPU, where nobody can look at them in time."""
    slots, heads, d, e = 6, 2, 64, 40
    (q, k, v), _, slope = decode_problem(dtype, rows=8, slots=8, heads=heads, dims=(d, e))
    acc = accumulation_dtype(dtype)
    inner = (e, d) if state_layout == "vk" else (d, e + (3 if state_layout == "padded" else 0))
    memory = torch.randn(slots + 4, heads, *inner, dtype=acc, device=CUDA)
    before = memory.clone()
    pool = memory[2 : 2 + slots]
    pool = pool.mT if state_layout == "vk" else pool[..., :e]
    far = torch.iinfo(index_dtype)
    indices = torch.tensor([4, -1, slots, 0, slots + 1, far.max, far.min, -2], dtype=index_dtype, device=CUDA)
    out = la2.decode(q, k, v, pool, slope, state_indices=indices)
    torch.cuda.synchronize()
    live = {0: 4, 3: 0}
    for row in range(8):
        assert bool(out[row].any()) == (row in live), f"row {row}"
    twin = before.clone()[2 : 2 + slots]
    twin = twin.mT if state_layout == "vk" else twin[..., :e]
    rows = list(live)
    want = twin[list(live.values())].clone()
    la2.decode(q[rows], k[rows], v[rows], want, slope)
    torch.testing.assert_close(pool[list(live.values())], want, rtol=1e-6, atol=1e-6)
    changed = {i - 2 for i in range(slots + 4) if not torch.equal(memory[i], before[i])}
    assert changed == set(live.values())
    if state_layout == "padded":
        assert torch.equal(memory[..., e:], before[..., e:])


@pytest.mark.parametrize("backward", (False, True))
def test_out_of_memory_is_an_error_and_no_more(backward):
    x = Case(heads=16, length=8192, key_dim=128, value_dim=128, dtype=BF16).make(CUDA)

    def call():
        if backward:
            return la2.backward(*x.grads, *x.args, **x.options)
        return la2.forward_with_state(*x.args, **x.options)

    want = call()
    kept = [t.cpu() for t in want]
    del want
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    used = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    result = x.q.numel() * x.q.element_size()
    held = []
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4 * result) / total)
    try:
        # Until no result fits any more, also not between others. Backward: then room for two of its three.
        with pytest.raises(torch.cuda.OutOfMemoryError):
            while True:
                held.append(torch.empty(result, dtype=torch.int8, device=CUDA))
        if backward:
            del held[-2:]
        with pytest.raises(RuntimeError):
            call()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()
    assert torch.cuda.memory_allocated() == used
    assert_equal([t.cpu() for t in call()], kept)
    assert torch.ones(3, device=CUDA).sum().item() == 3


def test_time_to_the_first_result():
    """From torch with a live CUDA context to the first result: nothing is compiled, tuned or loaded in bulk."""
    code = (
        "import time, torch\n"
        "torch.cuda.init(); q = torch.randn(1, 8, 1024, 128, device='cuda', dtype=torch.bfloat16)\n"
        "s = torch.rand(8, device='cuda'); (q + 1).sum().item()\n"
        "begin = time.perf_counter()\n"
        "import lightning_attn2_ext\n"
        "out = torch.ops.la2.forward(q, q, q, s); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - begin, bool(out.isfinite().all()))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seconds, finite = done.stdout.split()
    assert finite == "True" and float(seconds) < 1.0, f"{float(seconds):.2f} s"


# ---- every kernel, tiny: for compute-sanitizer

TINY = [(BF16, dims, size) for dims in ((64, 64), (128, 128), (64, 128)) for size in (64, 128)]
TINY += [(BF16, (256, 256), 64), (BF16, (64, 256), 64), (FP16, (128, 128), 64), (FP16, (128, 128), 128)]
# 3 slices of D beside 4 of E in one launch: the slope gradient's dots are laid out by D's.
TINY += [(BF16, (144, 256), 64)]
TINY += [(FP16, (64, 64), 64), (FP16, (64, 64), 128), (FP16, (256, 64), 64)]
TINY += [(FP32, (64, 64), 64), (FP32, (40, 128), 64), (FP32, (256, 24), 64)]
TINY += [(FP64, (64, 64), 32), (FP64, (40, 128), 32), (FP64, (256, 24), 32)]


def moved_to_gpu(x):
    def move(t):
        return t.to(CUDA) if isinstance(t, torch.Tensor) else t

    return x.replace(**{name: move(t) for name, t in vars(x).items()})


@pytest.mark.sanitize
@pytest.mark.parametrize("segments", (1, 2))
@pytest.mark.parametrize("dtype, dims, size", TINY, ids=plan_id)
def test_tiny_prefill(monkeypatch, dtype, dims, size, segments):
    """out, gradients with and without the slope's; cut in two also the state pass and the combine pass. Two tokens
    stand behind the last whole chunk; the slope gradient is summed over sequences once, kept apart once."""
    monkeypatch.setenv("LA2_PLAN", f"family={FAMILY[dtype]},slice={size},segments={segments}")
    common = {"heads": 1, "key_dim": dims[0], "value_dim": dims[1], "dtype": dtype}
    for case in (
        Case(length=130, state_layout="vk", **common),
        Case(lengths=(67, 0, 63), slope_per_seq=True, layout="bnhd", **common),
    ):
        x = case.make("cpu")
        y = moved_to_gpu(x)
        got = [t.cpu() for t in run(y)]
        check(x, got)
        grads = la2.backward(*y.grads, *y.args, **y.options, need_dslope=False)
        check_backward(x, (*(t.cpu() for t in grads[:3]), None, grads[4].cpu()))


HOPPER_TINY = [(BF16, dims) for dims in ((64, 64), (128, 128), (64, 128), (128, 64), (256, 256))]
HOPPER_TINY += [(FP16, (128, 128))]


@needs_hopper
@pytest.mark.sanitize
@pytest.mark.parametrize("plan", ("segments=1", "segments=3", "slice=64,segments=2"))
@pytest.mark.parametrize("dtype, dims", HOPPER_TINY, ids=plan_id)
def test_tiny_hopper_prefill(monkeypatch, dtype, dims, plan):
    """The same for the Hopper kernels: every role, tails, packed neighbours, clusters, state and combine pass."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm90,{plan}")
    common = {"heads": 1, "key_dim": dims[0], "value_dim": dims[1], "dtype": dtype}
    for case in (
        Case(length=194, state_layout="vk", **common),
        Case(lengths=(67, 0, 130), slope_per_seq=True, layout="bnhd", **common),
    ):
        x = case.make("cpu")
        got = run(moved_to_gpu(x), need_dslope=False)
        check(x, [t if t is None else t.cpu() for t in got])


@pytest.mark.sanitize
@pytest.mark.parametrize("state_layout", ("kv", "vk", "padded"))
@pytest.mark.parametrize("dims", ((64, 40), (128, 24), (256, 64)), ids=plan_id)
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32, FP64), ids=plan_id)
def test_tiny_decode(dtype, dims, state_layout):
    """kv and vk have kernels of their own; padded rows are not 16-byte aligned and take the one for any strides."""
    case = Case(heads=1, batch=3, length=1, key_dim=dims[0], value_dim=dims[1], dtype=dtype, state_layout=state_layout)
    x = case.make("cpu")
    y = moved_to_gpu(x)
    before = x.initial_state.clone()
    if state_layout == "padded":  # which moving undoes
        wide = torch.zeros(3, 1, dims[0], dims[1] + 3, dtype=x.initial_state.dtype)
        wide[..., 2:-1] = x.initial_state
        y.initial_state = wide.to(CUDA)[..., 2:-1]
    assert (y.initial_state.stride(2) == 1) == (state_layout == "vk")
    indices = torch.tensor([2, -1, 0], dtype=torch.int32, device=CUDA)
    out = la2.decode(*(t[:, :, 0] for t in (y.q, y.k, y.v)), y.initial_state, y.slope, state_indices=indices)
    got, pool = out.cpu(), y.initial_state.cpu()
    assert not got[1].any() and torch.equal(pool[1], before[1])
    live, used = [0, 2], [2, 0]
    step = {"q": x.q[live], "k": x.k[live], "v": x.v[live], "initial_state": before[used]}
    check_forward(x.replace(**step), got[live][:, :, None], pool[used])


@pytest.mark.sanitize
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
@pytest.mark.parametrize("dims", ((64, 40), (128, 24), (256, 64)), ids=plan_id)
@pytest.mark.parametrize("dtype", (BF16, FP32, FP64), ids=plan_id)
def test_tiny_verify_and_commit(dtype, dims, pool):
    """Several tokens, pools in float32 and in bfloat16; the truth is computed on the CPU."""
    case = Case(heads=1, batch=3, length=3, key_dim=dims[0], value_dim=dims[1], dtype=dtype, state_layout=None)
    x = case.make("cpu")
    y = moved_to_gpu(x)
    q, k, v = (t.transpose(1, 2) for t in (y.q, y.k, y.v))
    slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=CUDA)
    for pool_dtype in (FP64,) if dtype == FP64 else (FP32, BF16):
        state = pool_of((4, 1, *dims), pool, pool_dtype, CUDA)
        before = state.cpu().clone()
        out = la2.verify(q, k, v, state, y.slope, state_indices=slots).cpu()
        assert torch.equal(state.cpu(), before) and not out[1].any()
        rows = {"q": x.q[[0, 2]], "k": x.k[[0, 2]], "v": x.v[[0, 2]]}
        wide = x.replace(**rows, initial_state=before[[2, 0]].to(accumulation_dtype(dtype)))
        truth = None  # in float64 it is off by as much as the result may be
        if dtype == FP64:
            truth = tuple(forward_truth(wide).values())
        check_forward(wide, out[[0, 2]].transpose(1, 2), against=truth)
        accepted = torch.tensor([2, 3, 0], device=CUDA)
        la2.commit(k, v, state, accepted, y.slope, state_indices=slots)
        after = state.cpu()
        assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
        if pool_dtype != BF16:
            two = wide.replace(**{n: t[:1, :, :2] for n, t in rows.items()}, initial_state=wide.initial_state[:1])
            truth = tuple(forward_truth(two).values()) if dtype == FP64 else None
            check_forward(two, None, after[[2]], against=truth)
        else:
            twin = pool_of((4, 1, *dims), pool, FP32, CUDA).copy_(before)
            la2.commit(k, v, twin, accepted, y.slope, state_indices=slots)
            assert torch.equal(after, twin.cpu().to(BF16))
        step = la2.decode(q[:, 0], k[:, 0], v[:, 0], state, y.slope, state_indices=slots)
        assert not step[1].any() and step[0].any()


def test_tiny_cases_cover_every_sm80_shape():
    """The list above against the kinds of launches that a plan can hold (csrc/core/plan.cpp)."""
    launched = set()
    for dtype, (d, e), size in TINY:
        if dtype in HALVES:
            launched |= {(dtype, d, size, "out"), (dtype, e, size, "grad"), (dtype, e, size, "slope")}
    shapes = ((64, 64), (64, 128), (128, 64), (128, 128), (256, 64))
    assert launched >= {(t, a, s, kind) for t in (BF16,) for a, s in shapes for kind in ("out", "grad", "slope")}
    assert {(FP16, a, s, "out") for a, s in shapes} <= launched
