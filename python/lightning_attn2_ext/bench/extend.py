"""``bench extend``: new tokens of many requests against a pool of states, as a serving engine has them.

"of floor" is the time in which a copy moves what must move, over the time taken: q, k, v and the output once, and each
state that is touched once in each direction. Decode rows are requests of one token: the same step by la2::extend and by
la2::decode. A result is compared with the recurrence in float64 before it is timed.
"""

from __future__ import annotations

import argparse

import torch

from .. import slopes, testing
from . import floor, gate, machine, report

REQUESTS, TOKENS, HEADS, DIM, ROWS = 20, 16384, (64, 8), 128, 256
QUICK = {"requests": 4, "tokens": 300, "heads": (2,), "dim": 32, "rows": 6}
EXTEND, SNAPSHOTS, FORWARD, DECODE = (
    "la2::extend",
    "la2::extend, a snapshot each",
    "la2::forward_with_state",
    "la2::decode",
)
POOLS = {"fp32": torch.float32, "bf16": torch.bfloat16}


#: Of lengths_of.
KINDS = ("uniform", "skewed", "random")


def lengths_of(kind: str, requests: int, tokens: int) -> list[int]:
    """uniform; skewed: one request has half of the tokens; random: cut at random places."""
    if kind == "random":
        cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(requests))[: requests - 1]
        edges = [0, *(cuts.sort().values + 1).tolist(), tokens]
        return [b - a for a, b in zip(edges, edges[1:], strict=False)]
    first = [tokens // 2] if kind == "skewed" and requests > 1 else []
    left, others = tokens - sum(first), requests - len(first)
    return first + [left // others + (i < left % others) for i in range(others)]


class Problem:
    def __init__(self, lengths, heads, dim, dtype, pool_dtype, device, seed=0):
        tokens = sum(lengths)
        q, k, v, _ = machine.qkv(1, heads, tokens, dim, dtype, device, seed)
        self.q, self.k, self.v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # [tokens, H, D]
        self.slope = slopes.minimax(heads, 0, 80).to(device)
        self.lengths, count = lengths, len(lengths)
        self._known = None
        generator = torch.Generator(device).manual_seed(seed + 1)
        self.state = torch.randn(2 * count, heads, dim, dim, generator=generator, device=device).to(pool_dtype)
        order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))
        self.slots, self.others = (x.to(device, torch.int32) for x in order.split(count))
        edges = [sum(lengths[:r]) for r in range(count + 1)]
        self.ends = torch.tensor(edges, dtype=torch.int32, device=device)
        self.counts = torch.tensor([n // 64 * 64 for n in lengths], dtype=torch.int32, device=device)
        self.offsets = torch.arange(count + 1, dtype=torch.int32, device=device)
        self.all_known = torch.ones(count, dtype=torch.bool, device=device)

    def extend(self, state):
        return torch.ops.la2.extend(
            self.q,
            self.k,
            self.v,
            state,
            self.ends,
            self.slope,
            read_slots=self.slots,
            has_initial_state=self.all_known,
        )

    def extend_with_snapshots(self, state):
        return torch.ops.la2.extend(
            self.q,
            self.k,
            self.v,
            state,
            self.ends,
            self.slope,
            read_slots=self.slots,
            snapshot_offsets=self.offsets,
            snapshot_tokens=self.counts,
            snapshot_slots=self.others,
        )

    def forward(self, initial):
        rows = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        return torch.ops.la2.forward_with_state(*rows, self.slope, initial_state=initial, cu_seqlens=self.ends)

    def decode(self, state):
        return torch.ops.la2.decode(self.q, self.k, self.v, state, self.slope, state_indices=self.slots)

    def floor_bytes(self) -> int:
        states = 2 * self.state[0].numel() * self.state.element_size() * len(self.lengths)
        return floor.forward_bytes(self.q, self.v) + states

    def _truth(self):
        """Of three heads: their numbers, (out, states) in float64, and what plain PyTorch is off by at most."""
        if self._known is None:
            last = self.q.shape[1] - 1
            heads = sorted({0, last // 2, last})
            rows = [x[:, heads].transpose(0, 1)[None] for x in (self.q, self.k, self.v)]
            before, slope = self.state[self.slots.long()][:, heads], self.slope[heads]
            acc = testing.accumulation_dtype(self.q.dtype)
            exact = {"cu_seqlens": self.ends, "initial_state": before.double()}
            want = testing.chunked(*(x.double() for x in rows), slope.double(), **exact, chunk=256)
            worst = [0.0, 0.0]
            for chunk in (64, 128):
                out, state = testing.chunked(*rows, slope, **exact | {"initial_state": before.to(acc)}, chunk=chunk)
                found = (testing.error(x, y).l2 for x, y in zip((out, state.to(self.state.dtype)), want, strict=True))
                worst = [max(pair) for pair in zip(worst, found, strict=True)]
            self._known = heads, want, worst
        return self._known

    def judge(self, run) -> gate.Verdict:
        """out and the requests' states, which `run(state)` leaves in the pool, of three heads against float64."""
        heads, want, worst = self._truth()
        state = self.state.clone()
        out = run(state)
        got = out[:, heads].transpose(0, 1)[None], state[self.slots.long()][:, heads]
        names, roundoff = ("out", "state"), (torch.finfo(x.dtype).eps / 2 for x in got)
        errors = {n: testing.error(x, y).l2 for n, x, y in zip(names, got, want, strict=True)}
        return gate.Verdict(errors, {n: testing.MARGIN * w + r for n, w, r in zip(names, worst, roundoff, strict=True)})


def _timed(name: str, problem: Problem, run, clock, bytes_per_s, repeats, verdict) -> dict:
    least = problem.floor_bytes() / bytes_per_s * 1e3
    row = {"op": name, "floor_ms": least, "passed": verdict.passed, "errors": verdict.errors, "bounds": verdict.bounds}
    if not verdict.passed:
        print(f"WRONG RESULT, not timed: {name}: {verdict}")
        return row
    state = problem.state.clone()
    row["ms"] = clock.median(lambda: run(state), repeats)
    return row | {"of_floor": least / row["ms"]}


def measure(sizes: dict, dtype, pool_dtype, clock, bytes_per_s, repeats) -> list[dict]:
    rows = []
    for heads in sizes["heads"]:
        for kind in KINDS:
            lengths = lengths_of(kind, sizes["requests"], sizes["tokens"])
            problem = Problem(lengths, heads, sizes["dim"], dtype, pool_dtype, clock.device)
            runs = {EXTEND: problem.extend, SNAPSHOTS: problem.extend_with_snapshots}
            for name, run in runs.items():
                found = _timed(name, problem, run, clock, bytes_per_s, repeats, problem.judge(run))
                rows.append({"shape": f"{sizes['tokens']} tokens, {kind}", "h": heads, **found})
            initial = problem.state[problem.slots.long()].float()
            milliseconds = clock.median(lambda p=problem, s=initial: p.forward(s), repeats)
            least = rows[-1]["floor_ms"]
            found = {"op": FORWARD, "ms": milliseconds, "floor_ms": least, "of_floor": least / milliseconds}
            rows.append({"shape": rows[-1]["shape"], "h": heads, "passed": True, **found})
        problem = Problem([1] * sizes["rows"], heads, sizes["dim"], dtype, pool_dtype, clock.device)
        runs = {EXTEND: problem.extend}
        if pool_dtype == testing.accumulation_dtype(dtype):
            runs[DECODE] = problem.decode
        for name, run in runs.items():
            found = _timed(name, problem, run, clock, bytes_per_s, repeats, problem.judge(run))
            rows.append({"shape": f"{sizes['rows']} decode rows", "h": heads, **found})
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        shown = [f"{r['ms'] * 1e3:.1f}", f"{100 * r['of_floor']:.0f} %"] if "ms" in r else ["WRONG", "-"]
        error = f"{max(r['errors'].values()):.1e}" if r.get("errors") else "-"
        lines.append([f"H {r['h']}, {r['shape']}", r["op"], f"{r['floor_ms'] * 1e3:.1f}", *shown, error])
    return report.table(["requests", "op", "floor us", "us", "of floor", "error"], lines, texts=2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench extend", description=__doc__)
    machine.add_arguments(parser)
    parser.add_argument("--requests", type=int, help=f"default {REQUESTS}")
    parser.add_argument("--tokens", type=int, help=f"new tokens of all requests (default {TOKENS}; on a CPU a 16th)")
    parser.add_argument("--heads", nargs="+", type=int, metavar="H", help="default: 64 and 8")
    parser.add_argument("--head-dim", type=int, help=f"default {DIM}")
    parser.add_argument("--rows", type=int, help=f"decode rows (default {ROWS})")
    parser.add_argument("--pool", choices=POOLS, default="fp32", help="dtype of the states (default fp32)")
    parser.add_argument("--repeats", type=int, help="timed calls of which the median is shown (default 20)")
    arguments = parser.parse_args(argv)
    if arguments.plots:
        parser.error("--plots: bench extend draws nothing")
    device, dtype, facts = machine.open_machine(arguments)
    sizes = {"requests": REQUESTS, "tokens": TOKENS if device.type == "cuda" else TOKENS // 16, "heads": HEADS,
             "dim": DIM, "rows": ROWS}  # fmt: skip
    given = {"requests": arguments.requests, "tokens": arguments.tokens, "heads": arguments.heads,
             "dim": arguments.head_dim, "rows": arguments.rows}  # fmt: skip
    sizes |= QUICK if arguments.quick else {}
    sizes |= {name: value for name, value in given.items() if value}
    repeats = arguments.repeats or (3 if arguments.quick else 20)
    clock = machine.clock_for(device)
    bytes_per_s = machine.copy_bandwidth(clock)
    facts |= {"copy_gb_per_s": bytes_per_s / 1e9, "pool": arguments.pool, "shape": sizes}
    print(f"D={sizes['dim']}, {facts['dtype']}, states {arguments.pool}, {sizes['requests']} requests; copy: "
          f"{bytes_per_s / 1e9:.0f} GB/s read + written; medians of {repeats}")  # fmt: skip
    with torch.no_grad():
        rows = measure(sizes, dtype, POOLS[arguments.pool], clock, bytes_per_s, repeats)
    print("\n" + table(rows))
    if arguments.json:
        report.write_json(arguments.json, "extend", facts, rows)
    return 0 if all(r["passed"] for r in rows) else 1
