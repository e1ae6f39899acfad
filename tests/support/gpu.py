"""What the tests of tests/ops/test_cuda*.py share: results of a call, kernel families, slopes."""

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.tolerance import check_backward, check_forward

la2 = torch.ops.la2

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


def has_shared(kilobytes):
    """Whether a block may have so much shared memory."""
    return torch.cuda.is_available() and (
        torch.cuda.get_device_properties(0).shared_memory_per_block_optin >= kilobytes * 1024
    )


#: Slices of 128 at head dims over 64, by the portable kernels.
needs_wide_slices = pytest.mark.skipif(not has_shared(163), reason="needs 163 KB of shared memory a block")


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


def has_slice(dtype, dims, size):
    """Whether both launches of a backward have such a kernel (csrc/core/plan.cpp)."""
    if dtype == FP32:
        return size == 64
    if dtype == FP64:
        return size == 32
    return size == 64 or size == 128 and max(dims) <= 128


FAMILY = {BF16: "sm80", FP16: "sm80", FP32: "simt", FP64: "simt"}


def plan_id(value):
    return str(value).removeprefix("torch.")


def moved_to_gpu(x):
    def move(t):
        return t.to(CUDA) if isinstance(t, torch.Tensor) else t

    return x.replace(**{name: move(t) for name, t in vars(x).items()})
