"""``bench energy``: the same calls back to back, as a model of many layers makes them, and what they draw.

Other benchmarks leave the GPU a pause before each call, in which L2 is rewritten and it cools down; a model does not.
Here as many sets of inputs as exceed L2 several times are taken in turn, 100 calls ("layers") a round, for some
seconds without a pause: time a call (by the wall clock, with
the host's where that is longer) beside the flushed median, mean power, and joules for a million tokens (one layer,
the whole board, by NVML's counter of energy; it needs the package nvidia-ml-py). Results are checked against float64
before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import slopes, testing
from . import entries, gate, machine, ops, peers, report
from .timing import CudaClock

SHAPES = ((4, 32, 4096), (1, 64, 8192), (1, 8, 8192))
LAYERS = 100
#: All inputs together: several times any L2 (H200: 50 MiB).
INPUT_BYTES = 1 << 30
PEERS = (peers.Ours, peers.OursPortable, peers.Fla, peers.LightningAttn)


class Meter:
    """Joules that the GPU has taken since some time in the past, by NVML; None where it cannot say."""

    def __init__(self, device: torch.device):
        self.reason: str | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._millijoules = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception as error:  # no package, no library, no such counter, or no right to read it
            self.reason = f"{type(error).__name__}: {error}".splitlines()[0]

    def joules(self) -> float | None:
        return None if self.reason else self._millijoules() * 1e-3


def sustain(
    calls: Sequence[Callable[[], object]],
    seconds: float,
    joules: Callable[[], float | None],
    synchronize: Callable[[], None],
    layers: int = LAYERS,
) -> tuple[int, float, float | None]:
    """Rounds of ``layers`` calls, taken in turn, until the time is up: (calls, seconds, joules). A round before them is
    not counted."""
    turn = itertools.cycle(calls)

    def work() -> None:
        for _ in range(layers):
            next(turn)()
        synchronize()

    work()
    before, begin, made = joules(), time.perf_counter(), 0
    while made == 0 or time.perf_counter() - begin < seconds:
        work()
        made += layers
    taken, after = time.perf_counter() - begin, joules()
    return made, taken, None if before is None or after is None else after - before


def measure(
    peer: peers.Peer, sets: list[tuple[Tensor, ...]], slope: Tensor, clock, meter, seconds: float, repeats: int
) -> list[dict]:
    """One peer on one shape, forward and backward. ``sets``: q, k, v and grad_out of each layer."""
    peer.prepare(slope)
    forwards, backwards, first = [], [], {}
    for inputs in sets:
        own = [peer.lay_out(x) for x in inputs]
        leaves = [x.detach().requires_grad_() for x in own[:3]]
        out = peer.forward(*leaves)
        forwards.append(lambda own=own: peer.forward(*own[:3]))
        backwards.append(lambda out=out, leaves=leaves, grad=own[3]: peer.backward(out, leaves, grad))
        first = first or {"out": peer.head_major(out.detach())}
    first |= {n: peer.head_major(g) for n, g in zip(("dq", "dk", "dv"), backwards[0](), strict=True)}
    margin = testing.MARGIN if isinstance(peer, peers.Ours) else gate.PEER_MARGIN
    verdict = gate.check_ends(first, list(sets[0]), slope, margin)
    del first
    batch, heads, length, dim = sets[0][0].shape
    rows = []
    for what, calls in (("forward", forwards), ("backward", backwards)):
        row = {"shape": f"{batch},{heads},{length},{dim}", "what": what, "op": peer.name, "passed": verdict.passed}
        row |= {"errors": verdict.errors, "bounds": verdict.bounds, "sets": len(sets)}
        if not verdict.passed:
            print(f"WRONG RESULT, no figures: {peer.name} {what}: {verdict}")
        else:
            with torch.no_grad() if what == "forward" else contextlib.nullcontext():
                flushed = clock.median(calls[0], repeats)
                made, taken, joules = sustain(calls, seconds, meter.joules, clock.synchronize)
            row |= {"flushed_ms": flushed, "ms": taken / made * 1e3, "calls": made}
            row |= {"watts": None if joules is None else joules / taken}
            row |= {"joules_per_mtoken": None if joules is None else joules / made / (batch * length) * 1e6}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    def number(value, form: str) -> str:
        return "-" if value is None else form.format(value)

    lines = []
    for r in rows:
        cells = [r["shape"], r["what"], r["op"]]
        if r.get("skipped"):
            cells += [r["skipped"], "", "", "", ""]
        elif not r["passed"]:
            cells += ["WRONG", "", "", "", ""]
        else:
            cells += [f"{r['ms']:.3f}", f"{r['flushed_ms']:.3f}", f"{r['ms'] / r['flushed_ms']:.2f}"]
            cells += [number(r["watts"], "{:.0f}"), number(r["joules_per_mtoken"], "{:.2f}")]
        lines.append(cells)
    head = ["B,H,N,D", "", "op", "ms back to back", "ms flushed", "ratio", "W", "J / M tokens"]
    return report.table(head, lines, texts=3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench energy", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=ops.parse_shape, metavar="B,H,N[,D]", help="instead of the usual ones"
    )
    parser.add_argument("--only", nargs="+", metavar="OP", help="only operators whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=2.0, help="back to back, of each (default 2)")
    parser.add_argument("--repeats", type=int, default=20, help="flushed calls (default 20)")
    parser.add_argument("--json", metavar="OUT", help="write the results there too")
    arguments = parser.parse_args(argv)
    device = machine.cuda_device("bench energy")
    if device is None:
        return 2
    clock, meter, facts, rows = CudaClock(device), Meter(device), report.environment(), []
    facts["energy"] = meter.reason or "NVML"
    print(report.describe(facts))
    if meter.reason:
        print(f"no energy: {meter.reason}")
    present, facts["peers"] = entries.choose(device, torch.bfloat16, arguments.only, PEERS)
    for shape in arguments.shapes or SHAPES:
        b, h, n, d = (*shape, 128)[:4]
        needed = 4 * b * h * n * d * 2
        count = min(LAYERS, max(2, math.ceil(INPUT_BYTES / needed)))
        sets = [ops.draw_inputs(b, h, n, d, d, torch.bfloat16, device, seed) for seed in range(count)]
        slope = slopes.minimax(h, 0, 80, device=device)
        for peer in present:
            try:
                found = measure(peer, sets, slope, clock, meter, arguments.seconds, arguments.repeats)
            except Exception as error:  # one operator that cannot do a shape must not end the run
                failed = {"shape": f"{b},{h},{n},{d}"} | entries.failure(peer, error, device)
                found = [failed | {"what": what} for what in ("forward", "backward")]
            rows += found
            if arguments.json:  # a run that is cut off leaves what it has
                report.write_json(arguments.json, "energy", facts, rows)
        del sets
        torch.cuda.empty_cache()
    print(table(rows))
    return 0 if all(r["passed"] for r in rows if r["op"].startswith("la2")) else 1
