"""``bench scale``: context parallelism on the processes at hand, and a model of it for more than there are.

Alone it starts 1, 2 and 4 processes on this machine (gloo, CPU); under ``torchrun`` it measures on those processes
(NCCL on GPUs). The model is fitted to parts that are measured on their own, and printed beside measured whole calls
that were not part of the fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .. import slopes
from ..distributed import group as exchange
from ..distributed import lightning_attention_cp, shard_lengths, split_sequence
from ..distributed.context import Setting, passes
from ..distributed.states import arriving
from . import gate, report, timing
from .wire import Wire

KINDS = ("forward", "forward + backward")
WORLDS = (1, 2, 4)
RANKS = (8, 64, 256, 1024)
TOKENS = (1 << 20, 1 << 22, 1 << 24, 1 << 26)


@dataclasses.dataclass(frozen=True)
class Sizes:
    heads: int
    head_dim: int
    dtype: str
    lengths: tuple[int, ...]  # tokens in all, of whole calls
    fit: tuple[int, int]  # tokens on a rank, of the calls that are fitted
    blocks: tuple[int, ...]  # bytes of a rank's block in the all_gathers that are fitted
    repeats: int

    @property
    def state_bytes(self) -> int:
        return 4 * self.heads * self.head_dim**2


def sizes(device: str, quick: bool, repeats: int) -> Sizes:
    if device == "cuda":
        lengths, fit, blocks = (1 << 15, 1 << 17), (4096, 49152), (1 << 16, 1 << 20, 1 << 24)
        return Sizes(16, 128, "bfloat16", lengths, fit, blocks, repeats)
    lengths, fit = ((1024, 2048), (384, 1536)) if quick else ((8192, 24576), (1024, 8192))
    return Sizes(4, 64, "float32", lengths, fit, (1 << 12, 1 << 16, 1 << 20), repeats)


# ---- measuring, on every rank


def _inputs(chosen: Sizes, length: int, device: str, seed: int):
    generator = torch.Generator(device).manual_seed(seed)

    def normal():
        x = torch.randn(1, chosen.heads, length, chosen.head_dim, generator=generator, device=device)
        return x.to(getattr(torch, chosen.dtype))

    return F.silu(normal()), F.silu(normal()), normal(), normal()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _medians(calls: dict[tuple, Callable], device: str, repeats: int) -> dict[tuple, float]:
    """Median seconds of the slowest rank, all having started together.

    In rounds, each of all calls: what else the machine does falls on all alike. None follows one with the same inputs,
    which the caches would still have.
    """
    taken: dict[tuple, list[float]] = {name: [] for name in calls}
    order = sorted(calls, key=lambda name: name[-1] == KINDS[1])  # forwards first, then those with a backward
    for turn in range(repeats + 1):
        for name, call in ((name, calls[name]) for name in order):
            dist.barrier()
            _wait(device)
            begin = time.perf_counter()
            call()
            _wait(device)
            worst = torch.tensor(time.perf_counter() - begin, device=device)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if turn:
                taken[name].append(worst.item())
    return {name: statistics.median(values) for name, values in taken.items()}


def _both(call, q, k, v, grad_out) -> dict[str, Callable]:
    """`call(q, k, v)` alone, and with its backward."""

    def forward():
        with torch.no_grad():
            call(q, k, v)

    own = [x.detach().requires_grad_() for x in (q, k, v)]

    def backward():
        torch.autograd.grad(call(*own), own, grad_out)

    return dict(zip(KINDS, (forward, backward), strict=True))


def _judge(chosen: Sizes, length: int, device: str, call) -> gate.Verdict:
    """This rank's rows of out, dq, dk, dv against the recurrence on whole sequences."""
    slope = slopes.minimax(chosen.heads, 0, 12).to(device)
    whole = _inputs(chosen, length, device, seed=length)
    own = [split_sequence(x, 2).detach().requires_grad_() for x in whole]
    out = call(*own[:3], slope)
    got = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, own[:3], own[3]), strict=True))}
    want = gate.exact(*whole[:3], slope, whole[3])
    limits = gate.derived_bounds(*whole[:3], slope, whole[3], gate.testing.MARGIN)
    errors = {n: ((x.double() - split_sequence(want[n], 2)).norm() / want[n].norm()).item() for n, x in got.items()}
    return gate.Verdict(errors, limits)


def _gather(block: torch.Tensor, world: int) -> None:
    name = dist.group.WORLD.group_name
    exchange.wait(exchange.all_gather(block, world, name), name)


def _measure(chosen: Sizes, device: str, call=lightning_attention_cp) -> dict:
    """Everything that is measured with this many processes; the same dictionary on every rank. `call` replaces what is
    timed (the tests pass a wrong one)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    slope = slopes.minimax(chosen.heads, 0, 12).to(device)
    by_itself = Setting(1.0, "contiguous", 1, 0, dist.group.WORLD.group_name)  # in a group of one nothing is sent
    jobs: dict[tuple, Callable] = {}

    def add(name, argument, f, inputs):
        jobs.update({(name, argument, kind): job for kind, job in _both(f, *inputs).items()})

    whole = []
    for length in chosen.lengths:
        lengths = shard_lengths(length, world)

        def split(q, k, v, s=slope, lengths=lengths):
            return call(q, k, v, s, lengths=lengths)

        verdict = _judge(chosen, length, device, split)
        passed = torch.tensor(float(verdict.passed), device=device)
        dist.all_reduce(passed, dist.ReduceOp.MIN)
        row = {"n": length, "passed": bool(passed.item()), "errors": verdict.errors, "bounds": verdict.bounds}
        if row["passed"]:
            inputs = [split_sequence(x, 2).contiguous() for x in _inputs(chosen, length, device, seed=1)]
            add("calls", length, split, inputs)
            with Wire() as wire:
                jobs["calls", length, KINDS[1]]()
            row["bytes"] = sum(wire.sent.values())
        else:
            print(f"WRONG RESULT, not timed: {world} processes, rank {rank}, N={length}: {verdict}")
        whole.append(row)
    for length in chosen.fit:
        counts = torch.tensor([length])
        inputs = _inputs(chosen, length, device, seed=2), _inputs(chosen, length, device, seed=3)
        add("alone", length, lambda *x, n=counts: passes(*x, slope, None, n, None, by_itself)[0], inputs[0])
        add("one", length, lambda *x: torch.ops.la2.forward(*x, slope), inputs[1])
    for size in chosen.blocks if world > 1 else ():
        block = torch.zeros(size // 4, device=device)
        jobs["gather", size] = functools.partial(_gather, block, world)
    for blocks in (2, 32):
        states = torch.randn(blocks, 1, chosen.heads, chosen.head_dim, chosen.head_dim, device=device)
        weights = torch.rand(blocks, 1, chosen.heads, device=device)
        jobs["combine", blocks] = functools.partial(arriving, states, weights, torch.ones(blocks, dtype=torch.bool))
    taken = _medians(jobs, device, chosen.repeats)
    for row in whole:
        if row["passed"]:
            row["seconds"] = {kind: taken["calls", row["n"], kind] for kind in KINDS}
    return {
        "world": world,
        "calls": whole,
        "alone": [{"n": n, **{kind: taken["alone", n, kind] for kind in KINDS}} for n in chosen.fit],
        "one": [{"n": n, **{kind: taken["one", n, kind] for kind in KINDS}} for n in chosen.fit],
        "gather": [{"bytes": name[1], "seconds": t} for name, t in taken.items() if name[0] == "gather"],
        "combine": [{"blocks": name[1], "seconds": t} for name, t in taken.items() if name[0] == "combine"],
    }


def _threads() -> int:
    return max(1, (os.cpu_count() or 1) // max(WORLDS))


def _process(rank: int, world: int, folder: str, chosen: Sizes) -> None:
    torch.set_num_threads(_threads())  # the same for any number of processes: each stands for one device
    timing.keep_freed_memory()
    store = dist.FileStore(os.path.join(folder, f"store{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    result = _measure(chosen, "cpu")
    if rank == 0:
        with open(os.path.join(folder, f"result{world}.json"), "w") as file:
            json.dump(result, file)
    # All are done before anyone goes, and each goes without tearing down: gloo has been seen to abort there ("terminate
    # called without an active exception"), after the work, and to take a good result with it.
    dist.barrier()
    os._exit(0)


def _start(world: int, chosen: Sizes) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, folder, chosen), nprocs=world)
        with open(os.path.join(folder, f"result{world}.json")) as file:
            return json.load(file)


# ---- the model


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(value at 0, slope) of the line through two points, or of the least squares through more; neither below 0."""
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)
    return max(0.0, mean_y - slope * mean_x), slope


@dataclasses.dataclass(frozen=True)
class Model:
    """Seconds of one layer. Lines are (constant, per unit)."""

    one: dict[str, tuple[float, float]]  # the operator on one device, by tokens
    alone: dict[str, tuple[float, float]]  # both passes of a call, in a group of one, by tokens
    combine: tuple[float, float]  # by blocks
    alpha: float  # of a step of the ring
    beta: float  # seconds a byte
    state_bytes: int

    def gather(self, world: int) -> float:
        return (world - 1) * (self.alpha + self.beta * self.state_bytes)

    def seconds(self, kind: str, world: int, tokens: int) -> float:
        if world == 1:
            return self.one[kind][0] + self.one[kind][1] * tokens
        constant, rate = self.alone[kind]
        exchanges = KINDS.index(kind) + 1
        combine = self.combine[0] + self.combine[1] * world
        return constant + rate * tokens / world + exchanges * (self.gather(world) + combine)

    def efficiency(self, kind: str, world: int, tokens: int) -> float:
        return self.seconds(kind, 1, tokens) / (world * self.seconds(kind, world, tokens))


def fit(measured: dict, chosen: Sizes, alpha: float | None = None, beta: float | None = None) -> Model:
    """From the parts that `_measure` took on their own; alpha and beta, where given, in place of measured ones."""
    steps = max(1, measured["world"] - 1)
    here = line([(g["bytes"], g["seconds"] / steps) for g in measured["gather"]]) if measured["gather"] else (0.0, 0.0)
    return Model(
        one={kind: line([(p["n"], p[kind]) for p in measured["one"]]) for kind in KINDS},
        alone={kind: line([(p["n"], p[kind]) for p in measured["alone"]]) for kind in KINDS},
        combine=line([(p["blocks"], p["seconds"]) for p in measured["combine"]]),
        alpha=here[0] if alpha is None else alpha,
        beta=here[1] if beta is None else beta,
        state_bytes=chosen.state_bytes,
    )


# ---- telling


def measured_table(results: list[dict], chosen: Sizes) -> str:
    """Whole calls beside what the model of the same number of processes makes of them."""
    rows = []
    for measured in results:
        model = fit(measured, chosen)
        for call in measured["calls"]:
            for kind in KINDS:
                world = measured["world"]
                cells = [f"{world} process{'es' if world > 1 else ''}, N = {call['n']}, {kind}"]
                if not call["passed"]:
                    rows.append([*cells, "WRONG", "-", "-", "-"])
                    continue
                got, said = call["seconds"][kind], model.seconds(kind, world, call["n"])
                sent = f"{call['bytes']:,}" if kind == KINDS[1] else f"{call['bytes'] // 2:,}"
                rows.append([*cells, f"{got * 1e3:.2f}", f"{said * 1e3:.2f}", f"{said / got:.2f}", sent])
    return report.table(["a layer", "measured ms", "model ms", "model / measured", "bytes sent by a rank"], rows)


def expected_table(model: Model, ranks=RANKS, tokens=TOKENS) -> str:
    rows = []
    for total in tokens:
        shares = [f"{100 * model.efficiency(KINDS[1], world, total):.0f} %" for world in ranks]
        rows.append([f"N = {total:,}", *shares])
    exchange = [f"{2 * model.gather(world) * 1e3:.2f}" for world in ranks]
    memory = [f"{world * model.state_bytes / 2**20:,.1f}" for world in ranks]
    rows += [["both exchanges, ms", *exchange], ["gathered states, MiB", *memory]]
    return report.table(["forward + backward", *(f"{world} ranks" for world in ranks)], rows)


def assumptions(model: Model, chosen: Sizes, given: bool) -> str:
    constant, rate = model.alone[KINDS[1]]
    single = model.one[KINDS[1]][1]
    bandwidth = f"{1e-9 / model.beta:.2f} GB/s" if model.beta else "no limit"
    origin = "given" if given else "measured here"
    return "\n".join(
        [
            f"- B = 1, H = {chosen.heads}, D = E = {chosen.head_dim}, {chosen.dtype}; one state is "
            f"{chosen.state_bytes:,} bytes, whatever N",
            f"- an all_gather is a ring of W - 1 steps of alpha + bytes / bandwidth: alpha {model.alpha * 1e6:.0f} us, "
            f"{bandwidth} ({origin}), the same between any two ranks",
            f"- a rank computes as one process does here: {rate * 1e9:.1f} ns a token with both state-only passes, "
            f"{single * 1e9:.1f} without, and {constant * 1e3:.2f} ms a call, which does not shrink with N / W",
            f"- summing what arrives: {model.combine[1] * 1e6:.1f} us a rank; nothing overlaps",
            "- efficiency: time of one such process, if it could hold all N tokens, over W times the time of W of them",
            "- the operator alone: projections, feed-forward and other layers, which need no exchange, only raise it",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench scale", description=__doc__)
    parser.add_argument("--json", metavar="OUT", help="write the results there too")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of which the median is shown (default 5)")
    parser.add_argument("--alpha-us", type=float, help="model: microseconds of a step between two ranks")
    parser.add_argument("--gb-per-s", type=float, help="model: bandwidth between two ranks")
    parser.add_argument("--quick", action="store_true", help="short sequences: to see that it runs")
    arguments = parser.parse_args(argv)
    launched = "RANK" in os.environ
    if launched:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group()
        chosen = sizes(device, arguments.quick, arguments.repeats)
        results = [_measure(chosen, device)]
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank > 0:
            return 0 if all(c["passed"] for c in results[0]["calls"]) else 1
    else:
        chosen = sizes("cpu", arguments.quick, arguments.repeats)
        results = [_start(world, chosen) for world in WORLDS]
    facts = report.environment()
    print(report.describe(facts))
    where = "" if launched else f"; threads of a process: {_threads()}, on {os.cpu_count()} CPUs"
    print(f"B = 1, H = {chosen.heads}, D = {chosen.head_dim}, {chosen.dtype}; medians of {arguments.repeats}{where}\n")
    print(measured_table(results, chosen))
    passed = all(call["passed"] for measured in results for call in measured["calls"])
    if not passed:
        print("\na result is wrong: no model")
    else:
        alpha = None if arguments.alpha_us is None else arguments.alpha_us * 1e-6
        beta = None if arguments.gb_per_s is None else 1e-9 / arguments.gb_per_s
        # Compute from the run with the fewest processes, where none waits for another's core; the exchange from the
        # smallest that has one.
        linked = next((fit(m, chosen) for m in results if m["gather"]), None)
        if linked is not None:
            alpha, beta = linked.alpha if alpha is None else alpha, linked.beta if beta is None else beta
        model = fit(results[0], chosen, alpha, beta)
        given = arguments.alpha_us is not None or arguments.gb_per_s is not None
        print("\nexpected efficiency, not measured:\n\n" + expected_table(model))
        print("\nassuming\n" + assumptions(model, chosen, given))
    if arguments.json:
        report.write_json(arguments.json, "scale", facts, [{"setting": dataclasses.asdict(chosen)}, *results])
    return 0 if passed else 1
