"""Every kernel gives the same bits each time, in memory full of NaN, alone and beside others."""

import threading

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case, accumulation_dtype

la2 = torch.ops.la2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
RUNS = {"cpu": 10, "cuda": 100}

#: What tells kernels apart: dtype, key and value dim, LA2_PLAN. A plan that a GPU does not have is skipped there.
PORTABLE_CUTS = ("family=sm80,segments=3", "family=sm80,segments=2,pieces=3")
HALVES = [
    (dtype, dims, plan)
    for dtype in (BF16, FP16)
    for dims in ((64, 64), (128, 128), (64, 128), (128, 64), (256, 64), (256, 256))
    for plan in ("", "segments=3", "family=sm80", *PORTABLE_CUTS, "slice=64")
]
KERNELS = [
    *HALVES,
    *((t, d, p) for t in (FP32, FP64) for d in ((64, 64), (128, 40), (256, 256)) for p in ("", "segments=3")),
]


def run(x, need_dslope):
    """(out, final state, dq, dk, dv, dslope, dinitial state, a decode step, its state)"""
    state = x.initial_state.clone()
    rows = 1 if x.cu_seqlens is not None else x.q.shape[0]
    step = la2.decode(*(t[:rows, :, 0] for t in (x.q, x.k, x.v)), state[:rows], x.slope, scale=x.scale)
    grads = la2.backward(*x.grads, *x.args, **x.options, need_dslope=need_dslope)
    return *la2.forward_with_state(*x.args, **x.options), *grads, step, state


def make(device, dtype, dims, lengths=None):
    x = Case(heads=4, batch=2, length=700, lengths=lengths, key_dim=dims[0], value_dim=dims[1], dtype=dtype).make(
        device
    )
    x.slope = torch.tensor([0.0, 0.01, 0.3, 50.0], dtype=accumulation_dtype(dtype), device=device)
    return x


def poison():
    """Every block that torch's allocator hands out next is full of NaN: results, workspaces and all."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    sizes = (1 << 25, *[5 << 20] * 8, *[1 << 17] * 64, *[128] * 512)
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in sizes]
    torch.cuda.synchronize()
    del blocks


def assert_equal(got, want):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i} differs in {int((a != b).sum())} of {a.numel()} elements"


@pytest.mark.parametrize("dtype, dims, plan", KERNELS, ids=str)
@pytest.mark.parametrize("need_dslope", (False, True))
@pytest.mark.parametrize("lengths", (None, (300, 0, 1, 899)), ids=("dense", "packed"))
def test_every_kernel_repeats_to_the_bit(device, monkeypatch, dtype, dims, plan, need_dslope, lengths):
    if device == "cpu" and (plan or max(dims) > 128 or dtype == FP16):
        pytest.skip("the CPU has no plans, and one kernel for all dims")
    monkeypatch.setenv("LA2_PLAN", plan)
    x = make(device, dtype, dims, lengths)
    try:
        first = run(x, need_dslope)
    except RuntimeError as error:
        if "no kernel of family" in str(error) or "LA2_PLAN" in str(error):
            pytest.skip(f"no such plan here: {error}")
        raise
    for i in range(RUNS[device]):
        if device == "cuda" and i < 2:
            poison()
            segments = torch.cuda.memory_stats()["segment.all.allocated"]
        got = run(x, need_dslope)
        if device == "cuda" and i < 2:
            assert torch.cuda.memory_stats()["segment.all.allocated"] == segments, "not all of its memory was poisoned"
        assert_equal(got, first)


def test_threads_and_streams_at_once(device):
    """Two threads, on a GPU with two streams each, all of them in the middle of something else."""
    kinds = [
        (BF16, (128, 128), None),
        (BF16, (64, 128), (300, 0, 1, 899)),
        (FP32, (64, 64), None),
        (FP16, (256, 64), None),
    ]
    problems = [make(device, *kind) for kind in kinds]
    want = [run(x, True) for x in problems]
    rounds = 30 if device == "cuda" else 5
    failures, start = [], threading.Barrier(2)

    def work(which):
        try:
            start.wait()
            streams = [torch.cuda.Stream() for _ in range(2)] if device == "cuda" else []
            results = []
            for i in range(rounds):
                for j in range(len(problems)):
                    at = (j + which) % len(problems)  # never in step with the other thread
                    if streams:
                        with torch.cuda.stream(streams[(i + j) % 2]):
                            results.append((at, run(problems[at], True)))
                    else:
                        results.append((at, run(problems[at], True)))
            for stream in streams:
                stream.synchronize()
            for at, got in results:
                assert_equal(got, want[at])
        except BaseException as error:
            failures.append(error)

    if device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
