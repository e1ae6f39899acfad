"""(a) The operator against length, tokens constant: forward, backward, peak memory (the paper's Fig. 3)."""

from __future__ import annotations

import pathlib

import torch

from ... import slopes
from .. import floor, machine, peers, plots, report
from .run import Run, judge

LETTER, TITLE = "a", "The operator against length, at a constant number of tokens"

#: The shape of the table in the README of the paper's own kernels.
README = {"b": 4, "h": 32, "n": 32768, "d": 128}
#: Milliseconds that one forward may take; softmax attention leaves the race there.
BUDGET_MS = 400.0


def shape(run: Run) -> tuple[int, int, int]:
    """Tokens, heads and head dim."""
    return (1024, 2, 16) if run.quick else (1 << 20, 16, 128) if run.gpu else (1 << 15, 4, 64)


def sweep(run: Run) -> list[int]:
    last = 1024 if run.quick else 1 << 20 if run.gpu else 1 << 15
    return [n for n in (1 << i for i in range(8, 21)) if n <= last]


def points(run: Run) -> list[dict]:
    tokens, heads, dim = shape(run)

    def point(peer: peers.Peer, n: int) -> dict:
        return {"op": peer.name, "b": tokens // n, "h": heads, "n": n, "d": dim}

    ours = [p for p in run.peers if isinstance(p, peers.Ours)]
    softmax = [p for p in run.peers if p.softmax]
    others = [p for p in run.peers if p not in ours and p not in softmax]
    found = [point(p, n) for p in ours for n in sweep(run)]
    # Shortest first: what a length took says whether the next one is within the budget.
    found += [point(p, n) for n in sweep(run) for p in softmax]
    if run.gpu and not run.quick:
        found += [{"op": p.name} | README for p in (*ours, *softmax)]
    # Triton compiles anew for every length and tunes itself: every fourth one.
    return found + [point(p, n) for n in sweep(run)[::4] for p in others]


def expected_ms(run: Run, config: dict) -> float:
    """By the time at a shorter length, of an operator whose time for a token grows with the length."""
    same = [r for r in run.store.rows(LETTER) if r["op"] == config["op"] and r.get("forward_ms")]
    work = config["b"] * config["h"] * config["n"] ** 2
    return max((r["forward_ms"] * work / (r["b"] * r["h"] * r["n"] ** 2) for r in same if r["n"] >= 2048), default=0.0)


def measure(run: Run, config: dict) -> dict:
    peer = next(p for p in run.peers if p.name == config["op"])
    if peer.softmax and expected_ms(run, config) > BUDGET_MS:
        return {"skipped": f"over {BUDGET_MS:.0f} ms", "passed": True}
    b, h, n, d = (config[x] for x in "bhnd")
    slope = slopes.minimax(h, 0, 80).to(run.device)
    inputs = machine.qkv(b, h, n, d, run.dtype, run.device, seed=n)
    run.free_memory()
    peer.prepare(slope)
    own = [peer.lay_out(x) for x in inputs]
    leaves = [x.detach().requires_grad_() for x in own[:3]]

    def forward():
        with torch.no_grad():
            return peer.forward(*own[:3])

    def both():
        out = peer.forward(*leaves)
        return out, *torch.autograd.grad(out, leaves, own[3])

    out = peer.forward(*leaves)
    grads = peer.backward(out, leaves, own[3])
    results = dict(zip(("out", "dq", "dk", "dv"), map(peer.head_major, (out.detach(), *grads)), strict=True))
    verdict = judge(peer, results, inputs, slope)
    del results, grads
    row = {"passed": verdict.passed, "errors": verdict.errors, "bounds": verdict.bounds}
    if not verdict.passed:
        return row
    row["forward_ms"] = run.median(forward)
    row["backward_ms"] = run.median(lambda: peer.backward(out, leaves, own[3]))
    row["forward_peak_bytes"] = machine.peak_bytes(forward, run.device)
    row["backward_peak_bytes"] = machine.peak_bytes(both, run.device)
    q, v = inputs[0], inputs[2]
    row["forward_of_floor"] = floor.forward_bytes(q, v) / run.bytes_per_s * 1e3 / row["forward_ms"]
    row["backward_of_floor"] = floor.backward_bytes(q, v) / run.bytes_per_s * 1e3 / row["backward_ms"]
    return row


def in_sweep(rows: list[dict]) -> list[dict]:
    return sorted((r for r in rows if {k: r[k] for k in README} != README), key=lambda r: r["n"])


def series(rows: list[dict], key: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for r in in_sweep(rows):
        if r.get(key):
            found.setdefault(r["op"], []).append((r["n"], r[key]))
    return found


def flatness(rows: list[dict], key: str) -> tuple[int, int, float] | None:
    """A short length (8,192 where there is one), the longest, and tokens/s at the latter over those at the former."""
    points = dict(series(rows, key).get(peers.Ours.name, ()))
    if len(points) < 2:
        return None
    short, long = 8192 if 8192 in points and max(points) > 8192 else min(points), max(points)
    return short, long, points[short] / points[long]


def crossing(rows: list[dict], key: str) -> str | None:
    """From which length on this operator is faster than the fastest softmax attention."""
    found = series(rows, key)
    ours = found.pop(peers.Ours.name, [])
    fastest: dict[float, float] = {}
    for name, points in found.items():
        if name.startswith("softmax"):
            for n, ms in points:
                fastest[n] = min(ms, fastest.get(n, ms))
    at = plots.crossing(ours, sorted(fastest.items()))
    shared = sorted(n for n, _ in ours if n in fastest)
    if not shared:
        return None
    if at:
        return f"{at[0]:.0f}"
    faster = all(ms < fastest[n] for n, ms in ours if n in fastest)
    return f"at or below {shared[0]}" if faster else f"above {shared[-1]}"


def section(rows: list[dict]) -> str:
    lines = []
    for r in sorted(rows, key=lambda r: ({k: r[k] for k in README} == README, r["n"], not r["op"].startswith("la2"))):
        lead = [f"{r['b']},{r['h']},{r['n']},{r['d']}", r["op"]]
        if "forward_ms" not in r:
            lines.append([*lead, r.get("skipped") or r.get("failed") or "WRONG RESULT", *"-----"])
            continue
        rate = r["b"] * r["n"] / 1e3
        cells = [f"{r['forward_ms']:.3f}", f"{r['backward_ms']:.3f}", f"{rate / r['forward_ms']:.2f}"]
        cells += [f"{rate / r['backward_ms']:.2f}", machine.megabytes(r["backward_peak_bytes"])]
        lines.append([*lead, *cells, f"{max(r['errors'].values()):.1e}"])
    header = ["B,H,N,D", "op", "fwd ms", "bwd ms", "fwd Mtok/s", "bwd Mtok/s", "peak MiB", "error"]
    text = [
        "Backward: the backward alone. Peak: what forward and backward hold beyond the inputs. Errors: the worst of "
        "out, dq, dk, dv against float64, on the first and last batch row and the steepest and flattest head.",
        report.table(header, lines, texts=2),
    ]
    for what in ("forward", "backward"):
        flat = flatness(rows, f"{what}_ms")
        if flat:
            text.append(f"{what}: tokens/s at N = {flat[1]:,} are {100 * flat[2]:.1f} % of those at N = {flat[0]:,}.")
        if found := crossing(rows, f"{what}_ms"):
            text.append(f"{what}: the length from which it is faster than the fastest softmax attention: {found}.")
    return "\n\n".join(text)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    made = []
    for key, y in (
        ("forward_ms", "milliseconds"),
        ("backward_ms", "milliseconds"),
        ("forward_peak_bytes", "bytes"),
        ("backward_peak_bytes", "bytes"),
    ):
        values = series(rows, key)
        if values:
            made.append(folder / f"a_{key}.png")
            title = key.replace("_ms", "").replace("_", " ") + ", a constant number of tokens"
            plots.lines(made[-1], values, title=title, x="length", y=y, caption=caption)
    return made


def release() -> None:
    pass
