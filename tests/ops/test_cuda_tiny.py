"""Every CUDA kernel there is, tiny.

Their truth is computed on the CPU, so that compute-sanitizer (tests/record.py) has next to nothing but these kernels to
look at in the tests marked `sanitize`.
"""

import itertools

import pytest
import torch

from tests.support.cases import Case, accumulation_dtype
from tests.support.gpu import (
    BF16,
    CUDA,
    FAMILY,
    FP16,
    FP32,
    FP64,
    HALVES,
    check,
    moved_to_gpu,
    needs_hopper,
    needs_wide_slices,
    plan_id,
    run,
)
from tests.support.pools import pool_of
from tests.support.tolerance import check_backward, check_forward, forward_truth

la2 = torch.ops.la2
pytestmark = pytest.mark.gpu


TINY = [(BF16, dims, size) for dims in ((64, 64), (128, 128), (64, 128)) for size in (64, 128)]
TINY += [(BF16, (256, 256), 64), (BF16, (64, 256), 64), (FP16, (128, 128), 64), (FP16, (128, 128), 128)]
# 3 slices of D beside 4 of E in one launch: the slope gradient's dots are laid out by D's.
TINY += [(BF16, (144, 256), 64)]
TINY += [(FP16, (64, 64), 64), (FP16, (64, 64), 128), (FP16, (256, 64), 64)]
TINY += [(FP32, (64, 64), 64), (FP32, (40, 128), 64), (FP32, (256, 24), 64)]
TINY += [(FP64, (64, 64), 32), (FP64, (40, 128), 32), (FP64, (256, 24), 32)]


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


HOPPER_TINY = [(BF16, dims) for dims in ((64, 64), (128, 128), (64, 128), (128, 64), (192, 192), (256, 256))]
HOPPER_TINY += [(FP16, (128, 128)), (FP16, (136, 192))]


def dense_and_packed(dims, dtype):
    common = {"heads": 1, "key_dim": dims[0], "value_dim": dims[1], "dtype": dtype}
    dense = Case(length=194, state_layout="vk", **common)
    packed = Case(lengths=(67, 0, 130), slope_per_seq=True, layout="bnhd", **common)
    return dense.make("cpu"), packed.make("cpu")


@needs_hopper
@pytest.mark.sanitize
@pytest.mark.parametrize("plan", ("segments=1", "segments=3", "slice=64,segments=2", "segments=2,pieces=2"))
@pytest.mark.parametrize("dtype, dims", HOPPER_TINY, ids=plan_id)
def test_tiny_hopper_prefill(monkeypatch, dtype, dims, plan):
    """The same for the Hopper kernels: every role, tails, packed neighbours, state and combine pass."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm90,{plan}")
    for x in dense_and_packed(dims, dtype):
        got = run(moved_to_gpu(x), need_dslope=False)
        check(x, [t if t is None else t.cpu() for t in got])


@needs_hopper
@pytest.mark.sanitize
@pytest.mark.parametrize("segments", (1, 2))
@pytest.mark.parametrize("dtype, dims", ((BF16, (128, 256)), (FP16, (256, 128)), (BF16, (64, 256))), ids=plan_id)
def test_tiny_hopper_gradients_alone(monkeypatch, dtype, dims, segments):
    """dq, dk and dv as three kernels, some of them in slices of 128."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm90,slice=128,segments={segments}")
    for x in dense_and_packed(dims, dtype):
        y = moved_to_gpu(x)
        dq, dk, dv, _, dstate = torch.ops.la2.backward(*y.grads, *y.args, **y.options, need_dslope=False)
        check_backward(x, [t if t is None else t.cpu() for t in (dq, dk, dv, None, dstate)])


@needs_hopper
@pytest.mark.sanitize
@pytest.mark.parametrize("segments", (2, 3))
@pytest.mark.parametrize("dims", ((64, 64), (128, 128)), ids=plan_id)
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=plan_id)
def test_tiny_hopper_prefill_in_one_pass(monkeypatch, dtype, dims, segments):
    """Blocks that wait for each other within a kernel."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm90,slice=64,segments={segments},passes=1")
    for x in dense_and_packed(dims, dtype):
        y = moved_to_gpu(x)
        check_forward(x, *(t.cpu() for t in torch.ops.la2.forward_with_state(*y.args, **y.options)))


@pytest.mark.sanitize
@pytest.mark.parametrize("plan", ("segments=2,pieces=2", "segment_len=128,pieces=2"))
@pytest.mark.parametrize("dtype, dims", ((BF16, (128, 128)), (FP16, (128, 128)), (BF16, (256, 64))), ids=plan_id)
def test_tiny_portable_prefill_in_pieces(monkeypatch, dtype, dims, plan):
    """Pieces of one chunk or two, of a whole segment and of a short one."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm80,passes=3,{plan}")
    for x in dense_and_packed(dims, dtype):
        got = run(moved_to_gpu(x))
        check(x, [t if t is None else t.cpu() for t in got])


@needs_wide_slices
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype, segments", ((BF16, 2), (BF16, 3), (FP16, 3)), ids=plan_id)
def test_tiny_portable_prefill_in_one_pass(monkeypatch, dtype, segments):
    """Also with blocks that have no segment: three sequences of 197 tokens could be cut into four of 128."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm80,slice=128,segments={segments},passes=1")
    uncut = Case(heads=1, lengths=(100, 0, 97), key_dim=128, value_dim=128, dtype=dtype).make("cpu")
    for x in (*dense_and_packed((128, 128), dtype), uncut):
        y = moved_to_gpu(x)
        check_forward(x, *(t.cpu() for t in torch.ops.la2.forward_with_state(*y.args, **y.options)))


@needs_hopper
@pytest.mark.sanitize
@pytest.mark.parametrize("plan", ("segments=1", "segments=3", "slice=64,segments=2"))
@pytest.mark.parametrize("dims", ((64, 64), (128, 128)), ids=plan_id)
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=plan_id)
def test_tiny_hopper_silu(monkeypatch, dtype, dims, plan):
    """The warps that take SiLU of what was copied."""
    monkeypatch.setenv("LA2_PLAN", f"family=sm90,{plan}")
    for x in dense_and_packed(dims, dtype):
        y = moved_to_gpu(x)
        rows = {name: torch.nn.functional.silu(getattr(x, name)) for name in ("q", "k", "v")}
        check_forward(x.replace(**rows), *(t.cpu() for t in la2.forward_silu(*y.args, **y.options)))


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
@pytest.mark.parametrize("state_layout", ("kv", "vk"))
@pytest.mark.parametrize("dims", ((40, 24), (128, 72)), ids=plan_id)
def test_tiny_steps_of_many_rows(dims, state_layout):
    """So many states are cut into larger parts (simt/with_state_part.cuh), here past the end of D."""
    rows = 1030
    case = Case(
        heads=1, batch=rows, length=2, key_dim=dims[0], value_dim=dims[1], dtype=FP32, state_layout=state_layout
    )
    x = case.make("cpu")
    y = moved_to_gpu(x)
    q, k, v = (t.transpose(1, 2) for t in (y.q, y.k, y.v))
    out = la2.verify(q, k, v, y.initial_state, y.slope)
    first = la2.decode(q[:, 0], k[:, 0], v[:, 0], y.initial_state, y.slope)
    la2.commit(k[:, 1:], v[:, 1:], y.initial_state, torch.ones(rows, dtype=torch.int32, device=CUDA), y.slope)
    check_forward(x, out.cpu().transpose(1, 2), y.initial_state.cpu())
    assert torch.equal(first, out[:, 0])


AHEAD = list(itertools.product(((64, 64), (128, 72), (256, 256)), (FP32, BF16), ("kv", "vk")))
SANITIZED_AHEAD = (((128, 72), FP32, "kv"), ((256, 256), BF16, "vk"))  # each takes long there


@pytest.mark.parametrize(
    "dims, pool_dtype, layout",
    [pytest.param(*case, marks=pytest.mark.sanitize) if case in SANITIZED_AHEAD else case for case in AHEAD],
    ids=plan_id,
)
def test_states_ahead(dims, pool_dtype, layout):
    """Of 64 MiB of states a block asks for what later ones read (simt/launch_recurrent.cu), up to the last state."""
    rows, heads = -(-(65 << 20) // (8 * dims[0] * dims[1] * pool_dtype.itemsize)), 8
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (torch.randn(rows, heads, d, generator=generator, device=CUDA).to(BF16) for d in (dims[0], *dims))
    pool = pool_of((rows, heads, *dims), layout, pool_dtype, CUDA)
    parts = pool_of((rows, heads, *dims), layout, pool_dtype, CUDA).copy_(pool)
    out, half = la2.decode(q, k, v, pool), rows // 2
    want = [la2.decode(q[part], k[part], v[part], parts[part]) for part in (slice(half), slice(half, rows))]
    assert torch.equal(out, torch.cat(want)) and torch.equal(pool, parts)


@pytest.mark.sanitize
@pytest.mark.parametrize("heads, dim_v", ((1, 24), (43, 24), (40, 256)))
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32, FP64), ids=plan_id)
def test_tiny_gated_norm(dtype, heads, dim_v):
    """A row narrower than a warp, one of several warps, and one that its block walks twice."""
    rows, width = 3, heads * dim_v
    shapes = [(rows, heads, 8), (rows, heads, 8), (rows, heads, dim_v), (rows, width), (width,)]
    generator = torch.Generator().manual_seed(0)
    q, k, v, gate, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    arithmetic = accumulation_dtype(dtype)
    state = torch.zeros(rows, heads, 8, dim_v, dtype=arithmetic)
    want = la2.decode_gated_norm(q, k, v, state, gate, weight)
    got = la2.decode_gated_norm(*(t.to(CUDA) for t in (q, k, v, torch.zeros_like(state), gate, weight)))
    # Of 16 bits a row of decode may be rounded to the neighbour, and its norm again; where sums of eight products
    # cancel, they differ by some roundings of the terms.
    assert torch.allclose(
        got.cpu().double(), want.double(), rtol=4 * torch.finfo(dtype).eps, atol=10 * torch.finfo(arithmetic).eps
    )


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
