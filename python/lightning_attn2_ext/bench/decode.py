"""``bench decode``: one token for each of many sequences, beside the other ways to take that step.

A state is of fixed size, so a step costs the same behind any context; softmax attention reads a cache as long as the
context. "of floor" is the time in which a copy moves the states once in each direction, over the time taken.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib

import torch
from torch.nn import functional as F

from .. import slopes, testing
from ..demo import progress
from . import entries, gate, machine, plots, report

BATCHES = {"cuda": (1, 8, 64, 128), "cpu": (1, 4, 16)}
CONTEXTS = {"cuda": (1024, 8192, 32768, 131072), "cpu": (1024, 8192, 32768)}
OURS, SOFTMAX = "la2", "softmax with a cache"
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


def measure(names, batches, contexts, heads, dim, dtype, clock, bytes_per_s, repeats) -> list[dict]:
    device, rows = clock.device, []
    slope = slopes.minimax(heads, 0, 80).to(device)
    bar = progress.bar(len(batches) * (len(names) + len(contexts)), unit="case")
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


def table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        name = r["op"] + (f", {r['context']} tokens" if "context" in r else "")
        if not r["passed"] or "ms" not in r:
            shown = [r.get("skipped") or "WRONG", "-", "-"]
        else:
            of_floor = f"{100 * r['of_floor']:.0f} %" if "of_floor" in r else "-"
            shown = [f"{r['ms'] * 1e3:.1f}", f"{r['tokens_per_s']:,.0f}", of_floor]
        error = f"{max(r['errors'].values()):.1e}" if r.get("errors") else "-"
        lines.append([str(r["batch"]), name, *shown, error])
    return report.table(["sequences", "step", "us", "tokens/s", "of floor", "error"], lines, texts=2)


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
        if "context" not in r and "ms" in r:
            batches.setdefault(r["op"], []).append((r["batch"], r["tokens_per_s"]))
    path = folder / "decode_tokens_per_s.png"
    plots.lines(path, batches, title="decode", x="sequences", y="tokens/s", caption=caption)
    return [*made, path]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench decode", description=__doc__)
    machine.add_arguments(parser)
    parser.add_argument("--batches", nargs="+", type=int, metavar="B")
    parser.add_argument("--contexts", nargs="*", type=int, metavar="N", help="lengths of softmax's cache")
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
    facts |= {"copy_gb_per_s": bytes_per_s / 1e9, "shape": {"h": heads, "d": dim}}
    caption = f"H={heads}, D={dim}, {facts['dtype']}, states float32, {facts.get('gpu', facts['cpu'])}"
    print(f"{caption}; copy: {bytes_per_s / 1e9:.0f} GB/s read + written; medians of {repeats}")
    names, facts["ways"] = available(device)
    rows = measure(names, batches, contexts, heads, dim, dtype, clock, bytes_per_s, repeats)
    print("\n" + table(rows))
    if arguments.json:
        report.write_json(arguments.json, "decode", facts, rows)
    if arguments.plots:
        reason = plots.missing()
        made = [] if reason else draw(pathlib.Path(arguments.plots), rows, caption)
        print(f"no plots: {reason}" if reason else "drew " + ", ".join(map(str, made)))
    return 0 if all(r["passed"] for r in rows if r["op"] == OURS) else 1
