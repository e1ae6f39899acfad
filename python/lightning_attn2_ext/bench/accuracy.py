"""``bench accuracy``: how far every operator that is installed here is from the recurrence in float64.

Relative errors in the 2-norm, of the output and of the gradients by q, k and v, beside what the same maths in plain
PyTorch in the same dtype is off by, and what this package's own operator may be (testing.py).
"""

from __future__ import annotations

import argparse
import pathlib

import torch

from .. import slopes
from ..demo import progress
from . import compare, entries, machine, peers, plots, report

LENGTHS = {"cuda": (1024, 8192, 32768), "cpu": (256, 1024, 4096)}
NAMES = ("out", "dq", "dk", "dv")
#: Where in a model of 80 layers: the slopes of its first layer are the steepest, those of its last nearly zero.
LAYERS = {"first layer": 0, "middle layer": 40, "last layer": 79}


def measure(found, lengths, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    rows = []
    found = [p for p in found if not p.softmax]
    bar = progress.bar(len(lengths) * len(LAYERS) * len(found), unit="case")
    for n in lengths:
        inputs = machine.qkv(1, heads, n, dim, dtype, device, seed=n)
        for layer, index in LAYERS.items():
            slope = slopes.minimax(heads, index, 80).to(device)
            for peer in found:
                bar.update(1)
                row = {"op": peer.name, "n": n, "slopes": layer}
                try:
                    peer.prepare(slope)
                    verdict = compare.verdict_of(peer, inputs, slope, entries.has_backward(peer))
                except Exception as error:
                    message = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"failed: {peer.name} N={n}: {message}")
                    rows.append(row | {"passed": not isinstance(peer, peers.Ours), "skipped": "failed"})
                    continue
                rows.append(row | {"passed": verdict.passed, "errors": verdict.errors, "bounds": verdict.bounds})
    bar.close()
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        errors = r.get("errors", {})
        cells = [f"{errors[n]:.1e}" if n in errors else "-" for n in NAMES]
        verdict = r.get("skipped") or ("within" if r["passed"] else "OUTSIDE")
        lines.append([f"{r['slopes']}, N = {r['n']}", r["op"], verdict, *cells])
    return report.table(["slopes of the", "op", "bound", *NAMES], lines, texts=3)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    made = []
    for layer in LAYERS:
        series: dict[str, list[tuple[float, float]]] = {}
        for r in rows:
            if r["slopes"] == layer and r.get("errors"):
                series.setdefault(r["op"], []).append((r["n"], max(r["errors"].values())))
        path = folder / f"accuracy_{layer.split()[0]}.png"
        title = f"error against float64, slopes of the {layer}"
        plots.lines(path, series, title=title, x="length", y="error, worst of out, dq, dk, dv", caption=caption)
        made.append(path)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench accuracy", description=__doc__)
    machine.add_arguments(parser)
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N")
    parser.add_argument("--heads", type=int, help="default: 16 on a GPU, 8 on a CPU")
    parser.add_argument("--head-dim", type=int, help="default: 128 on a GPU, 64 on a CPU")
    parser.add_argument("--only", nargs="+", metavar="OP", help="only operators whose name contains one of these")
    arguments = parser.parse_args(argv)
    device, dtype, facts = machine.open_machine(arguments)
    gpu = device.type == "cuda"
    heads, dim = arguments.heads or (16 if gpu else 8), arguments.head_dim or (128 if gpu else 64)
    lengths = arguments.lengths or ((128, 256) if arguments.quick else LENGTHS[device.type])
    facts["shape"] = {"b": 1, "h": heads, "d": dim}
    caption = f"B=1, H={heads}, D={dim}, {facts['dtype']}, {facts.get('gpu', facts['cpu'])}"
    print(caption)
    found, facts["peers"] = entries.choose(device, dtype, arguments.only)
    rows = measure(found, lengths, heads, dim, dtype, device)
    print("\n" + table(rows))
    if arguments.json:
        report.write_json(arguments.json, "accuracy", facts, rows)
    if arguments.plots:
        reason = plots.missing()
        made = [] if reason else draw(pathlib.Path(arguments.plots), rows, caption)
        print(f"no plots: {reason}" if reason else "drew " + ", ".join(map(str, made)))
    return 0 if all(r["passed"] for r in rows if r["op"].startswith("la2")) else 1
