"""``bench calibrate``: the constants of the Hopper planner's cost model (csrc/core/plan_sm90.cpp), measured.

Microseconds that a kernel takes for one chunk of 64 tokens, in one block on its SM: the time of a launch with
fewer blocks than SMs, at two lengths, over the chunks between them; and what is left at no chunks.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict

import torch

from .. import slopes
from . import machine, report

CHUNK = 64
HEADS = 16  # blocks of a launch: memory is no limit to them
LENGTHS = (2048, 8192)

#: (D, E, LA2_PLAN): each kernel of the family in one of its runs.
PROBLEMS = (
    (64, 64, "slice=64"),
    (64, 128, "slice=128"),
    (128, 64, "slice=64"),
    (128, 128, "slice=64"),
    (128, 128, "slice=128"),
    (192, 64, "slice=64"),
    (192, 192, "slice=64"),
    (256, 64, "slice=64"),
    (256, 256, "slice=64"),
)


def kernel_times(call, repeats: int) -> dict[str, list[float]]:
    """Microseconds of every kernel of this package in a call, by name, over several calls."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            call()
            torch.cuda.synchronize()
    kernels = [e for e in recorded.events() if e.device_type.name == "CUDA" and "la2_" in e.name]
    times, free_at = defaultdict(list), 0.0
    for event in sorted(kernels, key=lambda e: e.time_range.start):
        # A kernel that was let in before the one before it was done has waited for that one: its own time begins then.
        begin = max(event.time_range.start, free_at)
        free_at = max(free_at, event.time_range.end)
        times[event.name.split("(la2")[0].replace("void ", "")].append(event.time_range.end - begin)
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench calibrate", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="OUT", help="write the results there too")
    arguments = parser.parse_args(argv)
    if machine.cuda_device("bench calibrate") is None:
        return 2
    print(report.describe(report.environment()))
    before = os.environ.get("LA2_PLAN")
    measured: dict[str, dict[int, float]] = defaultdict(dict)
    for d, e, plan in PROBLEMS:
        for length in LENGTHS:
            q, k = (torch.randn(1, HEADS, length, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            v, grad_out = (torch.randn(1, HEADS, length, e, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            slope = 0 * slopes.minimax(HEADS, device="cuda")  # no window: the state pass walks all
            for segments in (1, 2):
                os.environ["LA2_PLAN"] = f"family=sm90,{plan},segments={segments},passes=3"
                times = kernel_times(lambda: torch.ops.la2.forward(q, k, v, slope), arguments.repeats)  # noqa: B023
                if plan == "slice=64" or d > 64:  # else no plan of the backward has this slice
                    times |= kernel_times(
                        lambda: torch.ops.la2.backward(grad_out, None, q, k, v, slope, need_dslope=False),  # noqa: B023
                        arguments.repeats,
                    )
                for name, values in times.items():
                    if "combine" in name or (segments == 1) != ("trilinear" in name):
                        continue
                    measured[name][length // segments] = statistics.median(values)
    os.environ.pop("LA2_PLAN")
    if before is not None:
        os.environ["LA2_PLAN"] = before
    rows, results = [], []
    for name, times in sorted(measured.items()):
        (short, first), (long, second) = sorted(times.items())
        per_chunk = (second - first) * CHUNK / (long - short)
        fixed = first - per_chunk * short / CHUNK
        rows.append([name, f"{per_chunk:.2f}", f"{fixed:.1f}"])
        results.append({"kernel": name, "us_per_chunk": per_chunk, "us_fixed": fixed, "passed": True})
    print(report.table(["kernel", "us a chunk", "us fixed"], rows, texts=1))
    if arguments.json:
        report.write_json(arguments.json, "calibrate", report.environment(), results)
    return 0
