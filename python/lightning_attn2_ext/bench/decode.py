"""``bench decode``: one token for each of many sequences, beside the other ways to take that step, and the steps of
speculative decoding: 8 draft tokens verified, and committed.

A state is of fixed size, so a step costs the same behind any context; softmax attention reads a cache as long as the
context. "of floor" is the time in which a copy moves the states once in each direction (verify: only reads them; half
of the bytes in a bfloat16 pool), over the time taken. Scaling all states in place is the least that any step does.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import statistics

import torch
from torch.nn import functional as F

from .. import slopes, testing
from ..demo import progress
from ..functional import lightning_attention_decode
from . import entries, gate, machine, plots, report, timing

BATCHES = {"cuda": (1, 8, 64, 256), "cpu": (1, 4, 16)}
CONTEXTS = {"cuda": (1024, 8192, 32768, 131072), "cpu": (1024, 8192, 32768)}
OURS, SOFTMAX = "la2", "softmax with a cache"
BF16_POOL, VERIFY, COMMIT = "la2, bfloat16 states", "la2 verify, 8 tokens", "la2 commit, 8 tokens"
POOLS = (BF16_POOL, VERIFY, COMMIT)
DRAFT = 8  # tokens
SCALING = "states scaled in place"
#: A cache of keys and values larger than this is not made.
CACHE_BYTES = {"cuda": 32 << 30, "cpu": 1 << 30}


class _Steps:
    """Ways to take a step: each gives ``[B, H, D]`` and changes the states ``[B, H, D, D]`` that it was made with."""

    def __init__(self, state: torch.Tensor, slope: torch.Tensor):
        self.state, self.slope = state, slope
        self.slots = torch.arange(state.shape[0], device=state.device, dtype=torch.int32)

    def la2(self, q, k, v):
        return torch.ops.la2.decode(q, k, v, self.state, self.slope, state_indices=self.slots)

    def plain(self, q, k, v):
        decay = torch.exp(-self.slope)[:, None, None]
        self.state.mul_(decay).add_(k.float()[..., None] * v.float()[..., None, :])
        return (q.float()[..., None, :] @ self.state)[..., 0, :].to(q.dtype)

    def vllm(self, q, k, v):
        function = importlib.import_module(entries.Vllm.module).linear_decode_forward_triton
        rows = (x[:, :, None] for x in (q, k, v))
        return function(*rows, self.state, self.slope, self.slots).view(v.shape)

    def sglang(self, q, k, v):
        module = importlib.import_module(entries.Sglang.module)
        batch = q.shape[0]
        meta = module.SegLaMeta(
            batch_size=batch,
            max_q_length=1,
            q_offsets=torch.arange(batch + 1, device=q.device, dtype=torch.int32),
            s_offsets=self.slots,
            q_lengths=torch.ones_like(self.slots),
            s_scales=torch.ones_like(self.slots),
        )
        return module.seg_la_fwd(q, k, v, self.state, self.slope, meta, softmax_scale=1.0)

    def fla(self, q, k, v):
        function = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
        rows = (x[:, None] for x in (q, k, v))
        out, self.state = function(
            *rows, g_gamma=-self.slope, scale=1.0, initial_state=self.state, output_final_state=True
        )
        return out[:, 0]


WAYS = {OURS: "la2", "plain PyTorch": "plain", "vLLM": "vllm", "sglang seg_la": "sglang", "fla recurrent": "fla"}
_MODULES = {"vLLM": entries.Vllm.module, "sglang seg_la": entries.Sglang.module, "fla recurrent": "fla.ops.simple_gla"}


def available(device: torch.device) -> tuple[list[str], dict[str, str]]:
    found, said = [], {}
    for name in WAYS:
        reason = None
        if name in _MODULES:
            try:
                importlib.import_module(_MODULES[name])
                reason = "runs on a CUDA device only" if device.type == "cpu" else None
            except Exception as error:  # a package that is broken here is as absent as one that is not there
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        said[name] = f"skipped: {reason}" if reason else "present"
        if reason:
            print(f"skipped: {name}: {reason}")
        else:
            found.append(name)
    return found, said


def step_inputs(batch: int, heads: int, dim: int, dtype, device, seed: int = 0):
    q, k, v, _ = (x[:, :, 0].contiguous() for x in machine.qkv(batch, heads, 1, dim, dtype, device, seed))
    state = torch.randn(batch, heads, dim, dim, generator=torch.Generator(device).manual_seed(seed + 1), device=device)
    return q, k, v, state


def judge(name: str, q, k, v, state, slope) -> gate.Verdict:
    """Against the recurrence in float64; what it may be off by comes from the same step in plain PyTorch."""
    ways = _Steps(state.clone(), slope)
    got = getattr(ways, WAYS[name])(q, k, v)
    after = torch.exp(-slope.double())[:, None, None] * state.double()
    after = after + k.double()[..., None] * v.double()[..., None, :]
    want = {"out": (q.double()[..., None, :] @ after)[..., 0, :], "state": after}
    reference = _Steps(state.clone(), slope)
    plain = {"out": reference.plain(q, k, v), "state": reference.state}
    margin = testing.MARGIN if name == OURS else gate.PEER_MARGIN
    bounds = {n: b.l2 for n, b in testing.bounds(want, [plain], margin).items()}
    errors = {"out": testing.error(got, want["out"]).l2, "state": testing.error(ways.state, after).l2}
    return gate.Verdict(errors, bounds)


class _PoolStep:
    """One of POOLS: ``call()`` works on ``pool`` and gives ``[B, T, H, D]``, or None. Without order in its slots."""

    def __init__(self, name, batch, heads, dim, dtype, device, slope, seed=0):
        self.name, self.slope, self.tokens = name, slope, 1 if name == BF16_POOL else DRAFT
        q, k, v, _ = machine.qkv(batch, heads, self.tokens, dim, dtype, device, seed)
        self.q, self.k, self.v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        pool = step_inputs(batch, heads, dim, dtype, device, seed)[3]
        self.pool = pool.bfloat16() if name == BF16_POOL else pool
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
        self.slots = order.to(device, torch.int32)
        self.accepted = torch.full_like(self.slots, self.tokens)

    def call(self):
        options = {"state_indices": self.slots}
        if self.name == VERIFY:
            return torch.ops.la2.verify(self.q, self.k, self.v, self.pool, self.slope, **options)
        if self.name == COMMIT:
            return torch.ops.la2.commit(self.k, self.v, self.pool, self.accepted, self.slope, **options)
        rows = (x[:, 0] for x in (self.q, self.k, self.v))
        return torch.ops.la2.decode(*rows, self.pool, self.slope, **options)[:, None]

    def bytes(self) -> int:
        return (1 if self.name == VERIFY else 2) * self.pool.numel() * self.pool.element_size()

    def _recurrence(self, dtype):
        state, outs = self.pool[self.slots.long()].to(dtype), []
        decay = torch.exp(-self.slope.to(dtype))[:, None, None]
        for t in range(self.tokens):
            q, k, v = (x[:, t].to(dtype) for x in (self.q, self.k, self.v))
            state = decay * state + k[..., None] * v[..., None, :]
            outs.append((q[..., None, :] @ state)[..., 0, :])
        return torch.stack(outs, 1), state

    def judge(self) -> gate.Verdict:
        """Against the recurrence in float64, in the margin of plain PyTorch; verify leaves every bit of the states."""
        want = dict(zip(("out", "state"), self._recurrence(torch.float64), strict=True))
        out, state = self._recurrence(torch.float32)
        plain = {"out": out.to(self.q.dtype), "state": state.to(self.pool.dtype)}
        before = self.pool.clone()
        got = {"out": self.call(), "state": self.pool[self.slots.long()]}
        limits = {n: b.l2 for n, b in testing.bounds(want, [plain]).items()}
        errors = {n: testing.error(x, want[n]).l2 for n, x in got.items() if x is not None}
        if self.name == VERIFY:
            errors["state"], limits["state"] = testing.error(self.pool, before).l2, 0.0
        self.pool = before
        return gate.Verdict(errors, limits)


def measure_pools(batch, heads, dim, dtype, slope, clock, bytes_per_s, repeats) -> list[dict]:
    rows = []
    for name in POOLS:
        step = _PoolStep(name, batch, heads, dim, dtype, clock.device, slope)
        with torch.no_grad():
            verdict = step.judge()
            row = {"op": name, "batch": batch, "passed": verdict.passed}
            row |= {"errors": verdict.errors, "bounds": verdict.bounds}
            if verdict.passed:
                row["ms"] = clock.median(step.call, repeats, warmup=5)
                least = step.bytes() / bytes_per_s * 1e3
                row |= {"tokens_per_s": batch * step.tokens / row["ms"] * 1e3}
                row |= {"floor_ms": least, "of_floor": least / row["ms"]}
            else:
                print(f"WRONG RESULT, no figures: {name}, batch {batch}: {verdict}")
        rows.append(row)
    return rows


def measure_scaling(state, clock, bytes_per_s, repeats) -> dict:
    state, batch = state.clone(), state.shape[0]
    least = 2 * state.numel() * state.element_size() / bytes_per_s * 1e3
    milliseconds = clock.median(lambda: state.mul_(0.999), repeats, warmup=5)
    row = {"op": SCALING, "batch": batch, "passed": True, "ms": milliseconds}
    return row | {"floor_ms": least, "of_floor": least / milliseconds}


def measure(names, batches, contexts, heads, dim, dtype, clock, bytes_per_s, repeats) -> list[dict]:
    device, rows = clock.device, []
    slope = slopes.minimax(heads, 0, 80).to(device)
    bar = progress.bar(len(batches) * (len(names) + len(contexts) + 1), unit="case")
    for batch in batches:
        q, k, v, state = step_inputs(batch, heads, dim, dtype, device)
        least = 2 * state.numel() * state.element_size() / bytes_per_s * 1e3
        for name in names:
            bar.update(1)
            try:
                with torch.no_grad():
                    verdict = judge(name, q, k, v, state, slope)
            except Exception as error:
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"failed: {name}, batch {batch}: {message}")
                rows.append({"op": name, "batch": batch, "passed": name != OURS, "skipped": "failed", "error": message})
                continue
            row = {"op": name, "batch": batch, "passed": verdict.passed}
            row |= {"errors": verdict.errors, "bounds": verdict.bounds}
            if verdict.passed:
                ways = _Steps(state.clone(), slope)
                call = getattr(ways, WAYS[name])
                with torch.no_grad():
                    row["ms"] = clock.median(lambda call=call: call(q, k, v), repeats, warmup=5)  # noqa: B023
                row |= {"tokens_per_s": batch / row["ms"] * 1e3, "floor_ms": least, "of_floor": least / row["ms"]}
            else:
                print(f"WRONG RESULT, no figures: {name}, batch {batch}: {verdict}")
            rows.append(row)
        bar.update(1)
        rows += measure_pools(batch, heads, dim, dtype, slope, clock, bytes_per_s, repeats)
        rows.append(measure_scaling(state, clock, bytes_per_s, repeats))
        for context in contexts:
            bar.update(1)
            size = 2 * batch * heads * context * dim * q.element_size()
            row = {"op": SOFTMAX, "batch": batch, "context": context, "passed": True}
            if size > CACHE_BYTES[device.type]:
                rows.append(row | {"skipped": f"a cache of {size / 2**30:.0f} GiB"})
                continue
            generator = torch.Generator(device).manual_seed(context)
            cache = [
                torch.randn(batch, heads, context, dim, generator=generator, device=device).to(dtype) for _ in range(2)
            ]
            with torch.no_grad():
                row["ms"] = clock.median(
                    lambda q=q, cache=cache: F.scaled_dot_product_attention(q[:, :, None], *cache), repeats, warmup=5
                )
            rows.append(row | {"tokens_per_s": batch / row["ms"] * 1e3})
            del cache
    bar.close()
    return rows


def host_times(heads, dim, dtype, device) -> dict[str, list[float]]:
    """Microseconds of the host for an eager step of one sequence, by the function and by the operator, and for an
    in-place product of eight numbers, on each core, ascending."""
    q, k, v, state = step_inputs(1, heads, dim, dtype, device)
    step, eight = _Steps(state, slopes.minimax(heads, 0, 80).to(device)), torch.zeros(8, device=device)
    calls = {
        "function": lambda: lightning_attention_decode(q, k, v, step.state, step.slope, state_indices=step.slots),
        "operator": lambda: step.la2(q, k, v),
        "mul_": lambda: eight.mul_(0.5),
    }
    times = {}
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = timing.host_microseconds_by_core(calls, device)
        times |= {f"{name}, {mode.__name__}": taken for name, taken in found.items()}
    return times


def host_table(times: dict[str, list[float]]) -> str:
    shown = [[name, *(f"{of(t):.1f}" for of in (min, statistics.median, max))] for name, t in times.items()]
    return report.table(["one sequence, eager, us of the host", "least of the cores", "median", "most"], shown, texts=1)


def table(rows: list[dict]) -> str:
    lines = []
    scaling = {r["batch"]: r["ms"] for r in rows if r["op"] == SCALING}
    for r in rows:
        name = r["op"] + (f", {r['context']} tokens" if "context" in r else "")
        if not r["passed"] or "ms" not in r:
            shown = [r.get("skipped") or "WRONG", "-", "-", "-"]
        else:
            of_floor = f"{100 * r['of_floor']:.0f} %" if "of_floor" in r else "-"
            tokens = f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else "-"
            to_scaling = f"{r['ms'] / scaling[r['batch']]:.2f}" if r["batch"] in scaling else "-"
            shown = [f"{r['ms'] * 1e3:.1f}", tokens, of_floor, to_scaling]
        error = f"{max(r['errors'].values()):.1e}" if r.get("errors") else "-"
        lines.append([str(r["batch"]), name, *shown, error])
    return report.table(["sequences", "step", "us", "tokens/s", "of floor", "to scaling", "error"], lines, texts=2)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    made = []
    for batch in sorted({r["batch"] for r in rows}):
        here = [r for r in rows if r["batch"] == batch and "ms" in r]
        contexts = sorted({r["context"] for r in here if "context" in r}) or [1]
        series = {r["op"]: [(c, r["ms"] * 1e3) for c in contexts] for r in here if "context" not in r}
        series[SOFTMAX] = [(r["context"], r["ms"] * 1e3) for r in here if "context" in r]
        path = folder / f"decode_{batch}.png"
        title = f"one token for each of {batch} sequences"
        plots.lines(path, series, title=title, x="tokens behind it", y="microseconds", caption=caption)
        made.append(path)
    batches = {}
    for r in rows:
        if "context" not in r and "tokens_per_s" in r:
            batches.setdefault(r["op"], []).append((r["batch"], r["tokens_per_s"]))
    path = folder / "decode_tokens_per_s.png"
    plots.lines(path, batches, title="decode", x="sequences", y="tokens/s", caption=caption)
    return [*made, path]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench decode", description=__doc__)
    machine.add_arguments(parser)
    parser.add_argument("--batches", nargs="+", type=int, metavar="B")
    parser.add_argument("--contexts", nargs="*", type=int, metavar="N", help="lengths of softmax's cache")
    parser.add_argument(
        "--graph", action="store_true", help="in a CUDA graph, back to back; also the host's eager time"
    )
    parser.add_argument("--heads", type=int, help="default: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--head-dim", type=int, help="default: 128 on a GPU, 64 on a CPU")
    parser.add_argument("--repeats", type=int, help="timed steps of which the median is shown (default 50)")
    arguments = parser.parse_args(argv)
    device, dtype, facts = machine.open_machine(arguments)
    gpu = device.type == "cuda"
    heads, dim = arguments.heads or (64 if gpu else 8), arguments.head_dim or (128 if gpu else 64)
    batches = arguments.batches or ((1, 2) if arguments.quick else BATCHES[device.type])
    contexts = arguments.contexts
    if contexts is None:
        contexts = (256, 512) if arguments.quick else CONTEXTS[device.type]
    repeats = arguments.repeats or (3 if arguments.quick else 50)
    clock = machine.clock_for(device)
    bytes_per_s = machine.copy_bandwidth(clock)
    if arguments.graph:
        if not gpu:
            parser.error("--graph needs a CUDA device")
        clock, contexts = timing.GraphClock(device), ()
    facts |= {"copy_gb_per_s": bytes_per_s / 1e9, "shape": {"h": heads, "d": dim}, "graph": arguments.graph}
    caption = f"H={heads}, D={dim}, {facts['dtype']}, states float32, {facts.get('gpu', facts['cpu'])}"
    print(f"{caption}; copy: {bytes_per_s / 1e9:.0f} GB/s read + written; medians of {repeats}")
    names, facts["ways"] = available(device)
    rows = measure(names, batches, contexts, heads, dim, dtype, clock, bytes_per_s, repeats)
    print("\n" + table(rows))
    if arguments.graph:
        facts["eager_host_us"] = host_times(heads, dim, dtype, device)
        print("\n" + host_table(facts["eager_host_us"]))
    if arguments.json:
        report.write_json(arguments.json, "decode", facts, rows)
    if arguments.plots:
        reason = plots.missing()
        made = [] if reason else draw(pathlib.Path(arguments.plots), rows, caption)
        print(f"no plots: {reason}" if reason else "drew " + ", ".join(map(str, made)))
    return 0 if all(r["passed"] for r in rows if r["op"] in (OURS, *POOLS)) else 1
