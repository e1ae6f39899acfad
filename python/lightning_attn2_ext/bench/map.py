"""``bench map``: this operator against the fastest other implementation of it over heads and lengths, D = E = 128.

Every cell is the time of the fastest peer over ours (above 1: we are faster), for the forward and for the backward
alone, timed as in ``bench ops``; below it stands softmax attention by cuDNN over ours. Before a cell is timed, ours and
each peer are checked against float64 on the first and the last head. Writes JSON after each length, and a picture.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import torch

from .. import slopes, testing
from . import entries, floor, gate, machine, peers, plots, report
from .ops import draw_inputs
from .timing import CudaClock

HEADS = (1, 4, 8, 16, 32, 64, 128, 256)  # B H
LENGTHS = (64, 256, 1024, 4096, 16384, 65536)
SOFTMAX_UP_TO = 16384
MOST_HEADS = 64  # of one sequence: beyond, there are more sequences


def _is_right(peer: peers.Peer, out, grads, inputs, slope) -> gate.Verdict:
    results = {n: peer.head_major(x) for n, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)}
    margin = testing.MARGIN if isinstance(peer, peers.Ours) else gate.PEER_MARGIN
    return gate.check_ends(results, inputs, slope, margin)


def time_peer(peer: peers.Peer, inputs, slope, clock: CudaClock, repeats: int) -> dict[str, float]:
    """Milliseconds of forward and backward; RuntimeError where the results are wrong."""
    peer.prepare(slope)
    own = [peer.lay_out(x) for x in inputs]
    leaves = [x.detach().requires_grad_() for x in own[:3]]
    out = peer.forward(*leaves)
    if not peer.softmax:
        verdict = _is_right(peer, out.detach(), peer.backward(out, leaves, own[3]), inputs, slope)
        if not verdict.passed:
            raise RuntimeError(f"wrong result: {verdict}")

    def forward():
        with torch.no_grad():
            return peer.forward(*own[:3])

    return {
        "forward": clock.median(forward, repeats),
        "backward": clock.median(lambda: peer.backward(out, leaves, own[3]), repeats),
    }


def cell(present: list[peers.Peer], bh: int, n: int, clock: CudaClock, repeats: int) -> dict:
    """Of B H = ``bh`` and N = ``n``: {"times": {operator: {"forward": ms, "backward": ms} or {"failed": why}}}."""
    heads = min(bh, MOST_HEADS)
    slope = slopes.minimax(heads, 0, 80, device=clock.device)
    inputs = draw_inputs(bh // heads, heads, n, 128, 128, torch.bfloat16, clock.device)
    times = {}
    for peer in present:
        if peer.softmax and n > SOFTMAX_UP_TO:
            continue
        try:
            times[peer.name] = time_peer(peer, inputs, slope, clock, repeats)
        except (RuntimeError, ValueError, AssertionError) as error:  # out of memory is one too
            times[peer.name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"heads": bh, "length": n, "times": times}


def ratios(one: dict, what: str) -> tuple[float | None, float | None]:
    """(fastest peer, softmax) over ours, the slower of our two layouts."""
    times = {name: t[what] for name, t in one["times"].items() if what in t}
    ours = [ms for name, ms in times.items() if name.startswith("la2")]
    others = [ms for name, ms in times.items() if not name.startswith(("la2", "softmax"))]
    softmax = [ms for name, ms in times.items() if name.startswith("softmax")]
    if not ours:
        return None, None
    return tuple(min(group) / max(ours) if group else None for group in (others, softmax))


def shown(ratio: float | None) -> str:
    """One digit behind the point, two where it decides who is faster."""
    return "-" if ratio is None else f"{ratio:.2f}" if ratio < 1.095 else f"{ratio:.1f}"


def table(results: list[dict], what: str) -> str:
    cells = {(r["heads"], r["length"]): ratios(r, what) for r in results}
    lengths = sorted({n for _, n in cells})
    rows = []
    for bh in sorted({bh for bh, _ in cells}):
        rows.append([str(bh), *(" / ".join(map(shown, cells.get((bh, n), (None, None)))) for n in lengths)])
    return report.table([f"{what}: B H \\ N", *map(str, lengths)], rows)


def picture(path: pathlib.Path, results: list[dict], caption: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    heads, lengths = (sorted({r[key] for r in results}) for key in ("heads", "length"))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, what in zip(axes, ("forward", "backward"), strict=True):
        grid = torch.full((len(heads), len(lengths)), float("nan"))
        for r in results:
            peer, softmax = ratios(r, what)
            i, j = heads.index(r["heads"]), lengths.index(r["length"])
            if peer is not None:
                grid[i, j] = peer
            below = "" if softmax is None else f"\n({shown(softmax)})"
            weight = "bold" if peer is not None and peer < 1 else "normal"
            axis.text(j, i, shown(peer) + below, ha="center", va="center", fontsize=8, fontweight=weight)
        axis.imshow(grid.tolist(), norm=colors.LogNorm(1 / 8, 8), cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [plots._short(n) for n in lengths])
        axis.set_yticks(range(len(heads)), heads)
        axis.set_xlabel("length N")
        axis.set_ylabel("B H")
        axis.set_title(f"{what}: time of the fastest peer over ours\n(softmax over ours)")
    figure.supxlabel(caption, fontsize=7, color="#495057")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench map", description=__doc__)
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--only", nargs="+", metavar="OP", help="only operators whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", metavar="OUT", help="write the results there too")
    parser.add_argument("--plot", metavar="PNG", type=pathlib.Path)
    parser.add_argument("--from", dest="source", metavar="JSON", help="show and draw what was measured before")
    arguments = parser.parse_args(argv)
    if arguments.source:
        recorded = json.loads(pathlib.Path(arguments.source).read_text())
        facts, results = recorded["environment"], recorded["results"]
    else:
        device = machine.cuda_device("bench map")
        if device is None:
            return 2
        facts, results = measure(arguments, device)
    print("\n\n".join(table(results, what) for what in ("forward", "backward")))
    if arguments.plot and plots.missing() is None:
        picture(arguments.plot, results, " · ".join(report.describe(facts).splitlines()))
    behind = [
        (r["heads"], r["length"], w) for r in results for w in ("forward", "backward") if (ratios(r, w)[0] or 1) < 1
    ]
    if behind:
        print("slower than a peer at (B H, N): " + ", ".join(f"({bh}, {n}) {w}" for bh, n, w in behind))
    return 0 if results and not behind else 1


def measure(arguments, device: torch.device) -> tuple[dict, list[dict]]:
    facts, clock = report.environment(), CudaClock(device)
    facts["copy_gb_per_s"] = floor.copy_bandwidth(clock) / 1e9
    print(report.describe(facts))
    raced = [cls for cls in peers.PEERS if not issubclass(cls, peers.OursPortable)]
    present, facts["peers"] = entries.choose(device, torch.bfloat16, arguments.only, raced)
    results = []
    for n in arguments.lengths:
        for bh in arguments.heads:
            results.append(cell(present, bh, n, clock, arguments.repeats))
            torch.cuda.empty_cache()
            times = {name: [round(ms, 3) for ms in t.values()] if "failed" not in t else t["failed"]
                     for name, t in results[-1]["times"].items()}  # fmt: skip
            print(f"B H {bh}, N {n}: {times}", flush=True)
        if arguments.json:
            report.write_json(arguments.json, "map", facts, results)
    return facts, results
