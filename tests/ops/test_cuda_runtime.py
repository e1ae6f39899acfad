"""What only a GPU can show of calls: graphs, streams, threads, repeatability, memory, time to the first result."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from tests.support.cases import Case, accumulation_dtype
from tests.support.gpu import BF16, CUDA, FP16, FP32, FP64, NAN, alibi, assert_equal, check, run
from tests.support.tolerance import check_backward, check_forward

la2 = torch.ops.la2
pytestmark = pytest.mark.gpu


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
