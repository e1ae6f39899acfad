"""``bench compare``, ``bench speed``, ``bench memory``: every operator that is installed here, over growing lengths.

A result is first checked against float64 and gets no figure when it is wrong. What is not installed, or cannot run
on this device, is named and skipped; an operator whose time would exceed the budget leaves the race.
"""

from __future__ import annotations

import argparse
import pathlib

import torch

from .. import slopes, testing
from ..demo import progress
from . import entries, floor, gate, machine, peers, plots, report

LENGTHS = {"cuda": tuple(2**i for i in range(9, 18)), "cpu": tuple(2**i for i in range(8, 15))}
QUICK_LENGTHS = (256, 512)
WHATS = ("forward", "forward + backward")


def verdict_of(peer: peers.Peer, inputs: list[torch.Tensor], slope: torch.Tensor, backward: bool) -> gate.Verdict:
    q, k, v, grad_out = inputs
    results = dict(zip(("out", "dq", "dk", "dv"), run_once(peer, inputs, backward), strict=False))
    results = {name: peer.head_major(x) for name, x in results.items()}
    if peer.softmax:
        return gate.check_softmax(results["out"], q, k, v)
    margin = testing.MARGIN if isinstance(peer, peers.Ours) else gate.PEER_MARGIN
    return gate.check(results, q, k, v, slope, grad_out, margin)


def run_once(peer: peers.Peer, own: list[torch.Tensor], backward: bool, laid_out: bool = False):
    """The output, and the gradients by q, k, v with ``backward``."""
    q, k, v, grad_out = own if laid_out else [peer.lay_out(x) for x in own]
    if not backward:
        with torch.no_grad():
            return (peer.forward(q, k, v),)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = peer.forward(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))


def bytes_to_move(what: str, q: torch.Tensor, v: torch.Tensor) -> int:
    return floor.forward_bytes(q, v) + (floor.backward_bytes(q, v) if what != "forward" else 0)


def measure(
    peer: peers.Peer, what: str, inputs, slope, clock, bytes_per_s: float, repeats: int, wants: tuple[str, ...]
) -> dict:
    """One row: verdict, time and peak memory of one operator on one problem."""
    q, _, v, _ = inputs
    backward = what != "forward"
    peer.prepare(slope)
    verdict = verdict_of(peer, inputs, slope, backward)
    row = {"what": what, "op": peer.name, "n": q.shape[2], "passed": verdict.passed}
    row |= {"errors": verdict.errors, "bounds": verdict.bounds}
    if not verdict.passed:
        print(f"WRONG RESULT, no figures: {peer.name} {what} N={q.shape[2]}: {verdict}")
        return row
    own = [peer.lay_out(x) for x in inputs]

    def call():
        return run_once(peer, own, backward, laid_out=True)

    if "memory" in wants:
        row["peak_bytes"] = machine.peak_bytes(call, clock.device)
    if "time" in wants:
        row["ms"] = clock.median(call, repeats)
        row["tokens_per_s"] = q.shape[0] * q.shape[2] / row["ms"] * 1e3
        row["floor_ms"] = bytes_to_move(what, q, v) / bytes_per_s * 1e3
        row["of_floor"] = row["floor_ms"] / row["ms"]
    return row


def race(found, lengths, shape, dtype, clock, bytes_per_s, repeats, wants, budget_s: float) -> list[dict]:
    """All rows; ``shape`` is (B, H, D)."""
    b, h, d = shape
    device, rows, slope = clock.device, [], slopes.minimax(h, 0, 80).to(clock.device)
    last: dict[tuple[str, str], tuple[int, float]] = {}
    bar = progress.bar(len(lengths) * len(found) * len(WHATS), unit="case")
    for n in sorted(lengths):
        inputs = machine.qkv(b, h, n, d, dtype, device, seed=n)
        for what in WHATS:
            for peer in found:
                bar.set_postfix_str(f"{peer.name}, {what}, N={n}", refresh=False)
                bar.update(1)
                if what != "forward" and not entries.has_backward(peer):
                    continue
                before = last.get((peer.name, what))
                if before and before[1] * (n / before[0]) ** (2 if peer.softmax else 1) > budget_s * 1e3:
                    rows.append({"what": what, "op": peer.name, "n": n, "passed": True, "skipped": "over budget"})
                    continue
                try:
                    row = measure(peer, what, inputs, slope, clock, bytes_per_s, repeats, wants)
                except Exception as error:  # one operator that cannot do a shape must not end the run
                    message = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"failed: {peer.name} {what} N={n}: {message}")
                    passed = not isinstance(peer, peers.Ours)
                    row = {"what": what, "op": peer.name, "n": n, "passed": passed, "skipped": "failed"}
                    row["error"] = message
                if "ms" in row:
                    last[peer.name, what] = (n, row["ms"])
                rows.append(row)
        del inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()
    bar.close()
    return rows


_COLUMNS = {  # key of a row: (heading, text)
    "ms": ("ms", lambda v: f"{v:.3f}"),
    "tokens_per_s": ("tokens/s", lambda v: f"{v:,.0f}"),
    "of_floor": ("of floor", lambda v: f"{100 * v:.0f} %"),
    "peak_bytes": ("peak MiB", machine.megabytes),
}


def tables(rows: list[dict]) -> str:
    parts = []
    for what in WHATS:
        here = [r for r in rows if r["what"] == what]
        keys = [k for k in _COLUMNS if any(k in r for r in here)] or ["ms"]
        lines = []
        for r in here:
            shown = r.get("skipped") or ("-" if r["passed"] else "WRONG")
            cells = [_COLUMNS[k][1](r[k]) if k in r else shown if k == keys[0] else "-" for k in keys]
            error = f"{max(r['errors'].values()):.1e}" if r.get("errors") else "-"
            lines.append([f"N = {r['n']}", r["op"], *cells, error])
        if lines:
            parts.append(report.table([what, "op", *(_COLUMNS[k][0] for k in keys), "error"], lines, texts=2))
    return "\n\n".join(parts)


def series(rows: list[dict], what: str, key: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r["what"] == what and r.get(key):
            found.setdefault(r["op"], []).append((r["n"], r[key]))
    return found


def crossings(rows: list[dict]) -> list[dict]:
    """The lengths from which this operator is faster than softmax attention, at those that both were timed at."""
    found = []
    for what in WHATS:
        times = series(rows, what, "ms")
        ours = times.get(peers.Ours.name, [])
        for name, other in times.items():
            if name.startswith("softmax"):
                at = plots.crossing(ours, other)
                shared = [(ms, dict(other)[n]) for n, ms in ours if n in dict(other)]
                if at:
                    where = f"from N = {at[0]:.0f} on"
                else:
                    where = (
                        "at all of these lengths" if all(a < b for a, b in shared) else "not at the longest of these"
                    )
                found.append({"what": what, "op": name, "n": at and at[0], "ms": at and at[1], "where": where})
    return found


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    marks = crossings(rows)
    made = []
    pictures = {
        "ms": ("time", "milliseconds", True),
        "of_floor": ("share of the memory floor", "share", False),
        "tokens_per_s": ("tokens per second", "tokens/s", True),
        "peak_bytes": ("peak memory", "bytes", True),
    }
    for what in WHATS:
        for key, (title, y, log_y) in pictures.items():
            values = series(rows, what, key)
            if not values:
                continue
            marked = {}
            if key == "ms":
                marked = {
                    f"faster than {m['op']} from {m['n']:.0f}": (m["n"], m["ms"])
                    for m in marks
                    if m["what"] == what and m["n"]
                }
            name = f"{title.split()[0] if key != 'of_floor' else 'floor'}_{what.replace(' + ', '_')}.png"
            plots.lines(
                folder / name,
                values,
                title=f"{what}: {title}",
                x="length",
                y=y,
                caption=caption,
                log_y=log_y,
                marked=marked,
            )
            made.append(folder / name)
    return made


def command(name: str, wants: tuple[str, ...], only: list[str] | None, argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m lightning_attn2_ext bench {name}", description=__doc__)
    machine.add_arguments(parser)
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="instead of the usual ones")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, help="default: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--head-dim", type=int, help="default: 128 on a GPU, 64 on a CPU")
    parser.add_argument(
        "--only", nargs="+", metavar="OP", default=only, help="operators whose name contains one of these"
    )
    parser.add_argument("--repeats", type=int, help="timed calls of which the median is shown (default 20, CPU 5)")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds that one call may take (default 2)")
    arguments = parser.parse_args(argv)
    device, dtype, facts = machine.open_machine(arguments)
    gpu = device.type == "cuda"
    shape = (arguments.batch, arguments.heads or (64 if gpu else 8), arguments.head_dim or (128 if gpu else 64))
    lengths = arguments.lengths or (QUICK_LENGTHS if arguments.quick else LENGTHS[device.type])
    repeats = arguments.repeats or (20 if gpu else 1 if arguments.quick else 5)
    clock = machine.clock_for(device)
    bytes_per_s = machine.copy_bandwidth(clock)
    facts |= {"copy_gb_per_s": bytes_per_s / 1e9, "shape": dict(zip("bhd", shape, strict=True))}
    caption = f"B={shape[0]}, H={shape[1]}, D={shape[2]}, {facts['dtype']}, {facts.get('gpu', facts['cpu'])}"
    print(f"{caption}; copy: {bytes_per_s / 1e9:.0f} GB/s read + written; medians of {repeats}")
    found, facts["peers"] = entries.choose(device, dtype, arguments.only)
    rows = race(found, lengths, shape, dtype, clock, bytes_per_s, repeats, wants, arguments.budget)
    print("\n" + tables(rows))
    for mark in crossings(rows) if "time" in wants else []:
        print(f"{mark['what']}: la2 is faster than {mark['op']} {mark['where']}")
    if arguments.json:
        report.write_json(arguments.json, name, facts, rows)
    if arguments.plots:
        reason = plots.missing()
        made = [] if reason else draw(pathlib.Path(arguments.plots), rows, caption)
        print(f"no plots: {reason}" if reason else "drew " + ", ".join(map(str, made)))
    return 0 if all(r["passed"] for r in rows if r["op"].startswith("la2")) else 1


def main(argv: list[str] | None = None) -> int:
    return command("compare", ("time", "memory"), None, argv)
