"""``bench ops``: forward and backward on a CUDA device beside the packages that people use today.

Times are medians by CUDA events with L2 rewritten before each call; the backward is the autograd backward alone, the
graph retained, for everybody alike. "of floor" is the time in which a copy moves the bytes that must move, over the
time taken: 100 % would be a kernel that is only memory traffic, and no more of it than there must be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib

import torch
from torch.nn import functional as F

from .. import info, slopes, testing
from . import entries, floor, gate, peers, plots, report
from .extend import KINDS, lengths_of
from .timing import CudaClock

#: (B, H, N) with D = E = 128.
SHAPES = ((1, 8, 8192), (1, 64, 8192), (4, 32, 4096), (8, 32, 2048), (1, 16, 131072))
#: (H, number of sequences, tokens): one packed call, for each kind of lengths.
PACKED = ((64, 20, 32768), (8, 20, 32768))
QUICK_SHAPES = ((1, 8, 2048), (2, 32, 1024))
SOFTMAX_UP_TO = 8192


def draw_inputs(b: int, h: int, n: int, d: int, e: int, dtype, device, seed: int = 0):
    generator = torch.Generator(device).manual_seed(seed)

    def normal(dim):
        return torch.randn(b, h, n, dim, generator=generator, device=device, dtype=torch.float32)

    return F.silu(normal(d)).to(dtype), F.silu(normal(d)).to(dtype), normal(e).to(dtype), normal(e).to(dtype)


def run_peer(peer: peers.Peer, inputs, slope, clock, bytes_per_s: float, repeats: int) -> list[dict]:
    """Checks and times one peer on one shape: a result for the forward and one for the backward."""
    q, k, v, grad_out = inputs
    peer.prepare(slope)
    own = [peer.lay_out(x) for x in inputs]
    leaves = [x.detach().requires_grad_() for x in own[:3]]
    out = peer.forward(*leaves)

    def backward():
        return peer.backward(out, leaves, own[3])

    def forward():
        with torch.no_grad():
            return peer.forward(*own[:3])

    values = {"out": peer.head_major(out.detach())}
    if peer.softmax:
        verdicts = dict.fromkeys(("forward", "backward"), gate.check_softmax(values["out"], q, k, v))
    else:
        margin = testing.MARGIN if isinstance(peer, peers.Ours) else gate.PEER_MARGIN
        grads = {n: peer.head_major(g) for n, g in zip(("dq", "dk", "dv"), backward(), strict=True)}
        whole = gate.check({**values, **grads}, q, k, v, slope, grad_out, margin)
        verdicts = {
            "forward": gate.Verdict({"out": whole.errors["out"]}, {"out": whole.bounds["out"]}),
            "backward": gate.Verdict(
                {n: e for n, e in whole.errors.items() if n != "out"},
                {n: e for n, e in whole.bounds.items() if n != "out"},
            ),
        }
        del grads
    del values
    moved = {"forward": floor.forward_bytes(q, v), "backward": floor.backward_bytes(q, v)}
    results = []
    for what, call in (("forward", forward), ("backward", backward)):
        verdict = verdicts[what]
        milliseconds = clock.median(call, repeats) if verdict.passed else None
        least = moved[what] / bytes_per_s * 1e3
        results.append(
            {
                "what": what,
                "op": peer.name,
                "ms": milliseconds,
                "floor_ms": least,
                "of_floor": least / milliseconds if milliseconds else None,
                "errors": verdict.errors,
                "bounds": verdict.bounds,
                "passed": verdict.passed,
            }
        )
        if not verdict.passed:
            print(f"WRONG RESULT, not timed: {peer.name} {what}: {verdict}")
    return results


def run_packed(
    peer: peers.Peer, kind: str, h: int, num_seqs: int, tokens: int, d: int, dtype, clock, bytes_per_s, repeats
) -> list[dict]:
    """The forward with final states, and the backward of its outputs, over the sequences of one packed call."""
    lengths = lengths_of(kind, num_seqs, tokens)
    edges = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=clock.device)
    q, k, v, grad_out = inputs = draw_inputs(1, h, tokens, d, d, dtype, clock.device)
    slope = slopes.minimax(h, 0, 80, device=clock.device)
    peer.prepare(slope)
    own = [peer.lay_out(x) for x in inputs]
    leaves = [x.detach().requires_grad_() for x in own[:3]]

    def forward():
        with torch.no_grad():
            return peer.packed(*own[:3], cu_seqlens)

    out, state = peer.packed(*leaves, cu_seqlens)

    def backward():
        return peer.backward(out, leaves, own[3])

    results = dict(zip(("out", "dq", "dk", "dv"), map(peer.head_major, (out.detach(), *backward())), strict=True))
    margin = testing.MARGIN if isinstance(peer, peers.Ours) else gate.PEER_MARGIN
    limits = gate.derived_bounds(q, k, v, slope, grad_out, margin)
    difference, size = dict.fromkeys(results, 0.0), dict.fromkeys(results, 0.0)
    for a, b in itertools.pairwise(edges):
        want = gate.exact(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], slope, grad_out[:, :, a:b])
        for name, exact in want.items():
            difference[name] += (results[name][:, :, a:b].double() - exact).square().sum().item()
            size[name] += exact.square().sum().item()
    errors = {name: (difference[name] / size[name]) ** 0.5 for name in results}
    del results
    moved = {
        "forward": floor.forward_bytes(q, v) + state.numel() * state.element_size(),
        "backward": floor.backward_bytes(q, v),
    }
    rows = []
    for what, call in (("forward", forward), ("backward", backward)):
        names = ["out"] if what == "forward" else ["dq", "dk", "dv"]
        verdict = gate.Verdict({n: errors[n] for n in names}, {n: limits[n] for n in names})
        milliseconds = clock.median(call, repeats) if verdict.passed else None
        least = moved[what] / bytes_per_s * 1e3
        row = {"what": what, "op": peer.name, "ms": milliseconds, "floor_ms": least}
        row |= {"of_floor": least / milliseconds if milliseconds else None}
        row |= {"errors": verdict.errors, "bounds": verdict.bounds, "passed": verdict.passed}
        rows.append(row)
        if not verdict.passed:
            print(f"WRONG RESULT, not timed: {peer.name} packed {what}: {verdict}")
    return rows


def tables(results: list[dict]) -> str:
    parts = []
    for what in ("forward", "backward"):
        rows = []
        for r in results:
            if r["what"] != what:
                continue
            if r.get("skipped"):
                shown = [r["skipped"], "", ""]
            elif not r["passed"]:
                shown = ["WRONG", "-", f"{max(r['errors'].values()):.1e}"]
            else:
                shown = [f"{r['ms']:.3f}", f"{100 * r['of_floor']:.0f} %", f"{max(r['errors'].values()):.1e}"]
            rows.append([f"{r['shape']}", r["op"], f"{r['floor_ms']:.3f}" if "floor_ms" in r else "", *shown])
        if rows:
            parts.append(report.table([what, "op", "floor ms", "ms", "of floor", "error"], rows, texts=2))
    return "\n\n".join(parts)


def picture(path: pathlib.Path, results: list[dict], caption: str) -> None:
    """Share of the floor by shape, of our layouts the slower one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"la2": "la2", "la2 sm80": "la2, portable kernels"}
    shapes = list(dict.fromkeys(r["shape"] for r in results))
    whats = [w for w in ("forward", "backward") if any(r["what"] == w for r in results)]
    figure, axes = pyplot.subplots(1, len(whats), figsize=(11, 4.4), layout="constrained", squeeze=False, sharey=True)
    for axis, what in zip(axes[0], whats, strict=True):
        shares: dict[str, dict[str, float]] = {}
        for r in results:
            if r["what"] == what and r.get("of_floor"):
                name = r["op"].removesuffix(" BHND").removesuffix(" BNHD")
                own = shares.setdefault(names.get(name, name), {})
                own[r["shape"]] = min(own.get(r["shape"], 1e9), 100 * r["of_floor"])
        height = 0.8 / len(shares)
        for i, (name, own) in enumerate(shares.items()):
            places = [shapes.index(s) + (i - (len(shares) - 1) / 2) * height for s in own]
            bars = axis.barh(places, own.values(), height, label=name, color=plots._COLORS[i])
            axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        axis.set_yticks(range(len(shapes)), shapes)
        axis.set_xlim(0, 100)
        axis.set_xlabel("% of the memory floor")
        axis.set_title(what)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    axes[0][0].set_ylabel("B, H, N, D")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.supxlabel(caption, fontsize=7, color="#495057")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(x) for x in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (3, 4, 5):
        raise argparse.ArgumentTypeError(f"{text!r}, expected B,H,N or B,H,N,D or B,H,N,D,E")
    return values


def _draw(path: pathlib.Path | None, results: list[dict], facts: dict) -> int:
    if path is None:
        return 0
    if reason := plots.missing():
        print(f"no plot: {reason}")
        return 2
    picture(path, results, " · ".join(report.describe(facts).splitlines()))
    print(f"drew {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench ops", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, metavar="B,H,N[,D[,E]]", help="instead of the usual ones"
    )
    parser.add_argument("--packed", action="store_true", help="only the packed calls, beside what --shapes names")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", metavar="OP", help="only operators whose name contains one of these")
    parser.add_argument("--family", help="force a plan (sets LA2_PLAN): sm80, or pairs such as slice=64,segments=4")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of which the median is shown (default 20)")
    parser.add_argument("--json", metavar="OUT", help="write the results there too")
    parser.add_argument("--quick", action="store_true", help="two small shapes: to see that it runs")
    parser.add_argument("--plot", metavar="PNG", type=pathlib.Path, help="draw the shares of the floor")
    parser.add_argument("--from", dest="source", metavar="JSON", help="show and draw what was measured before")
    arguments = parser.parse_args(argv)
    if arguments.source:
        recorded = json.loads(pathlib.Path(arguments.source).read_text())
        print(tables(recorded["results"]))
        return _draw(arguments.plot, recorded["results"], recorded["environment"])
    if arguments.family:
        os.environ["LA2_PLAN"] = arguments.family if "=" in arguments.family else f"family={arguments.family}"
    if not torch.cuda.is_available():
        print("bench ops needs a CUDA device, and torch sees none; `bench cpu` measures this machine")
        return 2
    device = torch.device(arguments.device)
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    facts = report.environment()
    facts["la2_plan"] = os.environ.get("LA2_PLAN")
    clock = CudaClock(device)
    bytes_per_s = floor.copy_bandwidth(clock)
    facts["copy_gb_per_s"] = bytes_per_s / 1e9
    print(report.describe(facts))
    print(f"copy: {bytes_per_s / 1e9:.0f} GB/s read + written; {arguments.dtype}, medians of {arguments.repeats}")

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arguments.dtype]
    present, facts["peers"] = entries.choose(device, dtype, arguments.only, peers.PEERS)
    shapes = arguments.shapes or (() if arguments.packed else QUICK_SHAPES if arguments.quick else SHAPES)
    results: list[dict] = []

    def keep(rows: list[dict]) -> None:  # a run that is cut off leaves what it has
        results.extend(rows)
        if arguments.json:
            report.write_json(arguments.json, "ops", facts, results, says_so=False)

    for shape in shapes:
        b, h, n, d, e = (*shape, *((128, 128) if len(shape) == 3 else (shape[-1],) if len(shape) == 4 else ()))
        label = f"{b},{h},{n},{d}" + (f",{e}" if e != d else "")
        problem = f"{b},{h},{n},{d},{e},{arguments.dtype}"
        plan = [info.plan_line(p, info.device_name(device)) for p in (problem, problem + ",backward")]
        print("", *plan, sep="\n", flush=True)
        slope = slopes.minimax(h, 0, 80, device=device)
        inputs = draw_inputs(b, h, n, d, e, dtype, device)
        for peer in present:
            if peer.softmax and n > SOFTMAX_UP_TO:
                continue
            try:
                found = run_peer(peer, inputs, slope, clock, bytes_per_s, arguments.repeats)
            except Exception as error:  # one operator that cannot do a shape must not end the run
                failed = entries.failure(peer, error, device)
                found = [failed | {"what": what} for what in ("forward", "backward")]
            keep([{"shape": label, "plan": plan, **r} for r in found])
        del inputs
        torch.cuda.empty_cache()
        print(tables([r for r in results if r["shape"] == label]), flush=True)
    if arguments.packed or not arguments.shapes:
        packed = ((8, 5, 2048),) if arguments.quick else PACKED
        for (h, num_seqs, tokens), kind in itertools.product(packed, KINDS):
            label = f"{num_seqs} seqs, {tokens}, H {h}, {kind}"
            for peer in present:
                if not peer.has_packed:
                    continue
                sizes = (kind, h, num_seqs, tokens, 128)
                try:
                    found = run_packed(peer, *sizes, dtype, clock, bytes_per_s, arguments.repeats)
                except Exception as error:
                    failed = entries.failure(peer, error, device)
                    found = [failed | {"what": what} for what in ("forward", "backward")]
                keep([{"shape": label, **row} for row in found])
            print("\n" + tables([r for r in results if r["shape"] == label]), flush=True)
    print("\n" + tables(results))
    if arguments.json:
        report.write_json(arguments.json, "ops", facts, results)
    _draw(arguments.plot, results, facts)
    return 0 if all(r["passed"] for r in results if r["op"].startswith("la2")) else 1
