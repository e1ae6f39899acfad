"""``bench plans``: what the planner predicts beside what is measured, for the plan it chooses and for others.

For every shape the free choice and plans that LA2_PLAN forces: microseconds by CUDA events, L2 rewritten before each
call, over the prediction. Slopes are MiniMax's of the first layer: where sequences are cut, the state pass goes back as
far as the flattest of them reaches. Plans that a shape or GPU does not have are left out. Before a plan is timed its
results are checked against float64 on the first and the last head; wrong ones get no time.
"""

from __future__ import annotations

import argparse
import re

import torch

from .. import info, slopes
from ..testing import forced_plan
from . import gate, machine, report
from .timing import CudaClock

#: (B, H, N): few heads, where plans differ most, and the shapes that `bench ops` compares.
SHAPES = (
    *((1, h, n) for h in (1, 8, 16, 32) for n in (256, 1024, 4096, 16384)),
    *((b, 64, n) for b in (1, 4) for n in (64, 256)),
    *((1, 8, 8192), (1, 64, 8192), (4, 32, 4096), (8, 32, 2048)),
)
PLANS = (
    "",
    "family=sm90,segments=1",
    *(f"family=sm90,segments={n},passes=3" for n in (2, 4, 8, 16)),
    *(f"segments={n},passes=1" for n in (2, 4, 8, 16)),
    *(f"family=sm90,segments=8,passes=3,pieces={n}" for n in (1, 2, 4)),
    "family=sm80",
)


def predicted(shape: tuple[int, int, int], dim: int, what: str, device: str) -> tuple[float, str] | None:
    """(microseconds, the plan in words) under the LA2_PLAN that is in force; None where there is no such plan."""
    text = ",".join(map(str, (*shape, dim, dim))) + ",bf16" + (",backward" if what == "backward" else "")
    line = info.plan_line(text, device)
    found = re.search(r"predicted (\d+) us", line)
    return (float(found[1]), line.split(": ", 1)[1].split(", workspace")[0]) if found else None


def measure_shape(shape: tuple[int, int, int], dim: int, clock: CudaClock, repeats: int) -> list[dict]:
    batch, heads, length = shape
    name = info.device_name(clock.device)
    inputs = q, k, v, grad_out = [
        torch.randn(batch, heads, length, dim, device=clock.device, dtype=torch.bfloat16) for _ in range(4)
    ]
    slope = slopes.minimax(heads, 0, 80, device=clock.device)
    calls = {
        "forward": lambda: {"out": torch.ops.la2.forward(q, k, v, slope)},
        "backward": lambda: dict(
            zip(
                ("dq", "dk", "dv"),
                torch.ops.la2.backward(grad_out, None, q, k, v, slope, need_dslope=False)[:3],
                strict=True,
            )
        ),
    }
    rows = []
    for what, call in calls.items():
        for plan in PLANS:
            with forced_plan(plan):
                prediction = predicted(shape, dim, what, name)
                if prediction is None:
                    continue
                verdict = gate.check_ends(call(), inputs, slope)
                us = clock.median(call, repeats) * 1e3 if verdict.passed else None
            facts = {"shape": list(shape), "dim": dim, "what": what, "plan": plan, "words": prediction[1]}
            facts |= {"errors": verdict.errors, "bounds": verdict.bounds, "passed": verdict.passed}
            rows.append(facts | {"predicted_us": prediction[0]} | ({"us": us} if verdict.passed else {}))
            if not verdict.passed:
                print(f"WRONG RESULT, no figures: {shape} {what} LA2_PLAN={plan}: {verdict}")
    return rows


def table(rows: list[dict]) -> str:
    """A line for a shape and direction: what was chosen, how it was predicted, and the fastest that was forced."""
    lines = []
    right = [r for r in rows if r["passed"]]
    for free in (r for r in right if not r["plan"]):
        others = [r for r in right if r["plan"] and (r["shape"], r["what"]) == (free["shape"], free["what"])]
        best = min(others, key=lambda r: r["us"], default=free)
        lines.append(
            [
                ",".join(map(str, free["shape"])),
                free["what"],
                free["words"],
                f"{free['us']:.1f}",
                f"{free['predicted_us'] / free['us']:.2f}",
                best["plan"],
                f"{best['us']:.1f}",
            ]
        )
    head = ["B,H,N", "", "chosen", "us", "predicted / us", "fastest of the forced", "us"]
    return report.table(head, lines, texts=3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench plans", description=__doc__)
    parser.add_argument("--shapes", nargs="+", metavar="B,H,N", help="instead of the usual ones")
    parser.add_argument("--dim", type=int, default=128, help="D = E (default 128)")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", metavar="OUT", help="write the results there too")
    arguments = parser.parse_args(argv)
    device = machine.cuda_device("bench plans")
    if device is None:
        return 2
    clock, facts, rows = CudaClock(device), report.environment(), []
    print(report.describe(facts))
    for text in arguments.shapes or [",".join(map(str, s)) for s in SHAPES]:
        batch, heads, length = map(int, text.split(","))
        rows += measure_shape((batch, heads, length), arguments.dim, clock, arguments.repeats)
        if arguments.json:
            report.write_json(arguments.json, "plans", facts, rows)
    print(table(rows))
    return 0 if all(r["passed"] for r in rows) else 1
