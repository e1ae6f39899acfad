"""The Triton kernels agree with the specification: interpreted on a CPU, compiled on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from tests.support.cases import Case, cases
from tests.support.tolerance import check_backward, check_forward

pytest.importorskip("triton")
from triton_ref.backward import backward
from triton_ref.forward import forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes a millisecond for each line of a kernel.
problems = cases(limit=50, dim_limit=40) if DEVICE == "cpu" else cases(dim_limit=256)
CHUNK = 16 if DEVICE == "cpu" else None
EXAMPLES = settings(max_examples=12) if settings().derandomize else settings()


@EXAMPLES
@given(problems)
def test_forward(case):
    x = case.make(DEVICE)
    check_forward(x, *forward(*x.args, **x.options, chunk=CHUNK))


@EXAMPLES
@given(problems)
def test_backward(case):
    x = case.make(DEVICE)
    check_backward(x, backward(*x.grads, *x.args, **x.options, chunk=CHUNK))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("length", (16, 17, 33, 47))
def test_rows_just_behind_a_chunk_boundary(dtype, length):
    """By themselves, since in a whole tensor a factor e^s on a few small terms may hide."""
    x = Case(length=length, heads=2, dtype=dtype, slope="usual", layout="bnhd").make(DEVICE)
    out, _ = forward(*x.args, **x.options, chunk=16)
    x.windows = [(lo, min(lo + 2, length)) for lo in range(0, length, 16)]
    check_forward(x, out)


def test_no_rows_and_no_sequences():
    for case in (Case(batch=0, length=3), Case(batch=2, length=0), Case(lengths=()), Case(lengths=(0, 0))):
        x = case.make(DEVICE)
        out, final_state = forward(*x.args, **x.options)
        assert out.shape == x.v.shape
        torch.testing.assert_close(final_state, x.initial_state if case.length == 0 or not case.batch else final_state)
        *_, dslope, dinitial_state = backward(*x.grads, *x.args, **x.options)
        assert dslope.shape == x.slope.shape and not dslope.any()
        if case.batch and case.length == 0 and case.lengths != ():
            torch.testing.assert_close(dinitial_state, x.grad_final_state)


@pytest.mark.parametrize("arch", (80, 90))
def test_compiles_without_a_gpu(arch):
    """In a process of its own, since the interpreter replaces the compiler for all of this one."""
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script), str(arch)], capture_output=True, text=True, cwd=script.parents[2], timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("shared") == 6, run.stdout
