"""la2::extend on a GPU: every family and plan, what is cut and dealt out, graphs, memory."""

import copy

import pytest
import torch

from tests.support.cases import accumulation_dtype
from tests.support.pools import pool_of
from tests.support.requests import Problem, slots_of, x_acc

la2 = torch.ops.la2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = float("nan")
MIXED = (0, 1, 2, 63, 64, 65, 300)


def plans(dtype):
    """Every family that this GPU has for the dtype, in one piece and cut."""
    if not torch.cuda.is_available():
        return ("",)
    family = ("simt",) if dtype in (FP32, FP64) else ("sm80",)
    if dtype not in (FP32, FP64) and torch.cuda.get_device_capability() == (9, 0):
        family += ("sm90",)
    return tuple(f"family={f},segments={n}" for f in family for n in (1, 2, 3, 7))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16, FP64))
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
def test_every_family(monkeypatch, dtype, pool):
    """Cut requests read and write one slot in place; their first segment may not see what the last one wrote."""
    lengths = (1000, 1, 64, 0, 300, 2, 700)
    snapshots = [[(100, 30), (1000, 31)], [(1, 32)], [], [(0, 33)], [], [], [(699, 34)]]
    for plan in plans(dtype):
        monkeypatch.setenv("LA2_PLAN", plan)
        for dims in ((64, 64), (128, 128), (256, 64)):
            narrow = None if dtype == FP64 else BF16
            x = Problem("cuda", lengths, slots=slots_of(lengths, apart=dims == (64, 64)), snapshots=snapshots,
                        dtype=dtype, pool=pool, dims=dims, pool_dtype=narrow, fresh=(4,), tail=11,
                        slope="usual")  # fmt: skip
            wide = pool_of(x.state.shape, pool, accumulation_dtype(dtype), "cuda").copy_(x.state)
            before = wide.clone()
            out = x.run(wide)
            x.check(out, before, wide)
            assert torch.equal(out, x.run())
            assert torch.equal(x.state, wide.to(x.state.dtype))


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("dims", ((64, 40), (128, 128), (256, 64)))
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
@pytest.mark.parametrize("dtype", (FP32, BF16, FP64))
@pytest.mark.parametrize("family", ("simt", "sm80", "hopper"))  # tests/record.py leaves some to some tools, by name
def test_tiny(monkeypatch, family, dtype, pool, dims):
    """Every kernel of an extend, for compute-sanitizer; the truth is computed on the CPU."""
    lengths = (67, 1, 0, 130, 2, 3)
    slots = [(0, 0), (1, 1), (2, 3), (4, 5), (6, 6), (-1, -1)]
    snapshots = [[(64, 7), (65, 8)], [], [(0, 9)], [], [], []]
    name = {"hopper": "sm90"}.get(family, family)
    chosen = [p for p in plans(dtype) if "segments=7" not in p and name in p]
    if not chosen:
        pytest.skip(f"{family} has no kernels for this dtype here")
    for plan in chosen:
        monkeypatch.setenv("LA2_PLAN", plan)
        x = Problem("cpu", lengths, slots=slots, snapshots=snapshots, heads=1, dims=dims, dtype=dtype, pool=pool,
                    pool_dtype=FP64 if dtype == FP64 else BF16, fresh=(4,), tail=2)  # fmt: skip
        y = copy.copy(x)
        y.device = "cuda"
        y.q, y.k, y.v, y.slope = (t.to("cuda") for t in (x.q, x.k, x.v, x.slope))
        x.state = x.state.to(x_acc(x.q))
        y.state = pool_of(x.state.shape, pool, x.state.dtype, "cuda").copy_(x.state)
        narrow = pool_of(x.state.shape, pool, FP64 if dtype == FP64 else BF16, "cuda").copy_(x.state)
        out, after = y.run().cpu(), y.state.cpu()
        x.check(out, x.state, after)
        assert torch.equal(out, y.run(narrow).cpu()) and torch.equal(narrow.cpu(), after.to(narrow.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
def test_aligned_cuts_are_exact(monkeypatch, dtype):
    """With one plan a request cut at multiples of the chunk gives the bits of the whole one."""
    for plan in plans(dtype):
        if "segments=1" not in plan:
            continue
        monkeypatch.setenv("LA2_PLAN", plan + (",slice=64" if dtype != FP64 else ""))
        whole = Problem("cuda", (500,), dtype=dtype, dims=(128, 128), slope="usual", scale=1.0)
        state = whole.state.clone()
        outs = []
        for lo, hi in ((0, 128), (128, 192), (192, 448), (448, 500)):
            ends = whole.index([0, hi - lo])
            outs.append(la2.extend(whole.q[lo:hi], whole.k[lo:hi], whole.v[lo:hi], state, ends, whole.slope))
        assert torch.equal(torch.cat(outs), whole.run())
        assert torch.equal(state, whole.state)


@pytest.mark.gpu
@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
def test_pool_with_its_slots_scattered(monkeypatch, pool_dtype):
    """[H, slots, D, E] in memory; requests are cut, which read and write one slot."""
    monkeypatch.setenv("LA2_PLAN", "segments=3")
    lengths = (700, 1, 64, 300)
    x = Problem("cuda", lengths, slots=slots_of(lengths, apart=False), dtype=BF16, dims=(128, 128), heads=3,
                pool_dtype=pool_dtype, slope="usual")  # fmt: skip
    x.state = x.state.transpose(0, 1).contiguous().transpose(0, 1)
    x.run_and_check()


@pytest.mark.gpu
def test_requests_are_cut_where_it_gains(monkeypatch):
    """The device decides by the lengths: of alike ones none is cut, of unlike ones the long one; its state tells."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("decided on Hopper alone")
    # Longer than a segment, and not longer than what a lane walks; then one that is.
    for lengths, cuts in (((*[2000] * 5, *[425] * 15), False), ((8192, *[431] * 19), True)):
        x = Problem("cuda", lengths, dtype=BF16, dims=(128, 128), heads=8, slope="none")
        before = x.state.clone()
        free = x.state.clone()
        out = x.run(free)
        x.check(out, before, free)
        monkeypatch.setenv("LA2_PLAN", "slice=64,segments=1")
        x.run()
        changed = [r for r in range(len(lengths)) if not torch.equal(free[r], x.state[r])]
        assert changed == ([0] if cuts else [])
        monkeypatch.delenv("LA2_PLAN")


@pytest.mark.gpu
@pytest.mark.parametrize("pool, slope", (("kv", "usual"), ("vk", "none")))
@pytest.mark.parametrize("heads, dims", ((8, (128, 128)), (3, (64, 64)), (8, (128, 40))))
def test_what_is_cut_waits_beside_what_is_not(monkeypatch, heads, dims, pool, slope):
    """Requests that are not cut are done while states of the others are still gathered: the same bits every time, also
    where the memory of those states holds another batch's, alike but for its numbers."""
    lengths = (5000, *[431] * 12, 1, 0, 3000)
    snapshots = [[(4000, 50)], *[[] for _ in lengths[2:]], [(64, 51)]]
    x, other = (
        Problem("cuda", lengths, slots=slots_of(lengths), snapshots=snapshots, dtype=BF16, dims=dims, heads=heads,
                pool=pool, slope=slope, fresh=(3,), tail=9, num_slots=52, seed=seed)
        for seed in (0, 1)
    )  # fmt: skip
    before = x.state.clone()
    out = x.run_and_check()
    for _ in range(20):
        again = pool_of(x.state.shape, pool, x.state.dtype, "cuda").copy_(before)
        other.run()
        out_again = x.run(again)
        other.run()
        assert torch.equal(out, out_again)
        assert torch.equal(x.state, again)
    if torch.cuda.get_device_capability() == (9, 0) and slope == "none":  # then the state tells that it was cut
        monkeypatch.setenv("LA2_PLAN", "slice=64,segments=1")
        x.run(again.copy_(before))
        assert not torch.equal(again[x.slots[0][1]], x.state[x.slots[0][1]])


@pytest.mark.gpu
@pytest.mark.parametrize("heads, dims", ((1, (64, 64)), (8, (128, 128)), (40, (64, 128)), (2, (256, 256))))
@pytest.mark.parametrize("count", (20, 150))
@pytest.mark.parametrize("plan", ("", "segments=9"))
def test_every_unit_is_dealt(monkeypatch, heads, dims, count, plan):
    """Of few and many requests, to few and many lanes, with one long among them."""
    monkeypatch.setenv("LA2_PLAN", plan)
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(0, 6000 // count, (count,), generator=generator).tolist()
    lengths[count // 2] = 3000
    x = Problem("cuda", lengths, slots=slots_of(lengths), dtype=BF16, dims=dims, heads=heads, slope="usual")
    before = x.state.clone()
    out = x.run_and_check()
    assert torch.equal(out, x.run(before))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ("", "segments=1", "segments=3"))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_graph(monkeypatch, dtype, plan):
    """Captured with room for more tokens and requests, replayed with other lengths, slots and snapshots."""
    monkeypatch.setenv("LA2_PLAN", plan)
    requests, tokens = 6, 640
    x = Problem("cuda", (0,) * requests, tail=tokens, slots=[(r, r) for r in range(requests)], dtype=dtype,
                dims=(64, 64), num_slots=24, slope="usual")  # fmt: skip
    ends, read, write = x.index([0] * (requests + 1)), x.index([-1] * requests), x.index([-1] * requests)
    known = torch.ones(requests, dtype=torch.bool, device="cuda")
    offsets, counts, saved = x.index([0] * (requests + 1)), x.index([0] * 4), x.index([-1] * 4)
    options = {"read_slots": read, "write_slots": write, "has_initial_state": known, "snapshot_offsets": offsets,
               "snapshot_tokens": counts, "snapshot_slots": saved, "scale": x.scale}  # fmt: skip
    x_run = lambda: la2.extend(x.q, x.k, x.v, x.state, ends, x.slope, **options)  # noqa: E731
    x_run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x_run()
    for lengths, slots, fresh, snapshots in (
        ((1, 1, 1, 1, 0, 0), [(3, 3), (1, 1), (0, 7), (-1, -1), (-1, -1), (2, 8)], (1,), [[]] * 6),
        (
            (300, 0, 1, 200, 139, 0),
            [(r, r + 6) for r in range(6)],
            (),
            [[(64, 20), (300, 21)], [], [(1, 22)]] + [[]] * 3,
        ),
        ((640, 0, 0, 0, 0, 0), [(5, 5)] + [(-1, -1)] * 5, (), [[(0, 12), (1, 13), (333, 14), (640, 15)]] + [[]] * 5),
        ((2, 63, 64, 65, 1, 400), [(9, 9), (-1, -1), (8, 8), (7, 7), (6, 6), (5, 5)], (0, 5), [[]] * 6),
    ):
        x.lengths, x.slots, x.fresh, x.snapshots = lengths, slots, fresh, snapshots
        ends.copy_(x.index(x.ends))
        read.copy_(x.index([s for s, _ in slots]))
        write.copy_(x.index([s for _, s in slots]))
        known.copy_(torch.tensor([r not in fresh for r in range(requests)]))
        flat = [pair for found in snapshots for pair in found]
        offsets.copy_(x.index([sum(map(len, snapshots[:r])) for r in range(requests + 1)]))
        counts.copy_(x.index([n for n, _ in flat] + [0] * (4 - len(flat))))
        saved.copy_(x.index([s for _, s in flat] + [-1] * (4 - len(flat))))
        before = x.state.clone()
        graph.replay()
        x.check(out, before, x.state)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ("", "family=sm80,segments=2"))
@pytest.mark.parametrize("offsets", ([0, 2, 0, 2], [2, 0, 0, 0], [-5, 1, 99, 1], [0, 0, 0, 0]))
def test_snapshots_that_several_requests_claim(monkeypatch, offsets, plan):
    """Offsets that nobody has checked: some request's snapshot, always the same one, or none; nothing else changes."""
    monkeypatch.setenv("LA2_PLAN", plan)
    lengths, slots, snapshots = (300, 70, 5), [(0, 1), (2, 3), (4, 5)], [[(300, 7), (5, 8)], [], []]

    def run(given, **options):
        x = Problem("cuda", lengths, slots=slots, snapshots=given, dtype=BF16, dims=(64, 64), num_slots=12)
        options = x.options | {name: x.index(values) for name, values in options.items()}
        return la2.extend(x.q, x.k, x.v, x.state, x.index(x.ends), x.slope, **options), x.state

    want, states = run(None)
    first, second = run(snapshots, snapshot_offsets=offsets), run(snapshots, snapshot_offsets=offsets)
    assert torch.equal(first[0], want) and torch.equal(second[0], want)
    assert torch.equal(first[1], second[1])
    others = [slot for slot in range(12) if slot not in (7, 8)]
    assert torch.equal(first[1][others], states[others])
    assert first[1].isfinite().all()


@pytest.mark.gpu
def test_memory_that_was_something_else(monkeypatch):
    """Results and workspaces lie in memory full of NaN."""
    lengths = (500, 1, 0, 70, 3)
    slots = [(0, 0), (1, 1), (2, 5), (-1, -1), (3, 3)]
    for plan in ("segments=1", "segments=3"):
        monkeypatch.setenv("LA2_PLAN", plan)
        for dtype in (FP32, BF16):
            x = Problem("cuda", lengths, slots=slots, dtype=dtype, dims=(64, 64), tail=100)
            before = x.state.clone()
            blocks = [torch.full((n,), NAN, device="cuda") for n in (*[5 << 20] * 8, *[1 << 17] * 64, *[128] * 512)]
            torch.cuda.synchronize()
            del blocks
            x.check(x.run(), before, x.state)


@pytest.mark.gpu
def test_does_not_wait_for_the_gpu():
    x = Problem("cuda", MIXED, slots=slots_of(MIXED), snapshots=[[]] * 6 + [[(64, 40)]], dtype=BF16)
    ends, options = x.index(x.ends), x.options
    call = lambda: la2.extend(x.q, x.k, x.v, x.state, ends, x.slope, **options)  # noqa: E731
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        torch.cuda._sleep(200_000_000)
        call()
        assert not torch.cuda.current_stream().query(), "it waited, or the sleep was too short to tell"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(2))
def test_many_requests(seed):
    """More than one block of the plan has threads for, of every kind; so many states are cut into larger parts too."""
    generator = torch.Generator().manual_seed(seed)
    count = 1500
    lengths = torch.randint(0, 4, (count,), generator=generator).tolist()
    lengths[700] = 130
    slots = [(s, s) for s in torch.randperm(2 * count, generator=generator)[:count].tolist()]
    slots = [(-1, -1) if r % 11 == 0 else pair for r, pair in enumerate(slots)]
    dtype, dims, pool = ((FP32, (24, 16), "kv"), (BF16, (16, 24), "vk"))[seed]
    Problem("cuda", lengths, slots=slots, heads=1, dims=dims, dtype=dtype, pool=pool, slope="usual",
            num_slots=2 * count, tail=50).run_and_check()  # fmt: skip
