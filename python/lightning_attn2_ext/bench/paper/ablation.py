"""(d) Ablation: block size, intra-block and inter-block work, plans (slices, segments, families), states and dtypes.

The block of a CUDA kernel is fixed by its tile (64 tokens, 32 where the contracted dim is above 128), so what the block
size does to time and error is shown with the same mathematics in plain PyTorch, and the kernels' own freedom with
LA2_PLAN. Arithmetic, a token and a head, forward: 2 C (D + E) operations within the block, of which the mask throws
half away, and 4 D E through the state.
"""

from __future__ import annotations

import os
import pathlib

import torch
from torch import Tensor

from ... import info, slopes, testing
from .. import gate, machine, peers, plots, report
from .run import Run, judge

LETTER, TITLE = "d", "Ablation"
CHUNKS = (16, 32, 64, 128, 256, 512, 1024)
PLANS = (
    "", "segments=1", "segments=2", "segments=4", "segments=8", "segments=16", "segments=32", "slice=64", "slice=128",
    "family=sm80",
)  # fmt: skip
SLICE_PLANS = ("", "slice=64", "slice=128")
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = ("fp64", "fp32", "bf16", "fp16")


def points(run: Run) -> list[dict]:
    h, d, n = (2, 16, 256) if run.quick else (16, 128, 16384) if run.gpu else (4, 64, 4096)
    shape = {"b": 1, "h": h, "n": n, "d": d, "e": d}
    chunks = (16, 64) if run.quick else CHUNKS
    found = [{"part": "block", "chunk": c} | shape for c in chunks]
    found += [{"part": "share", "chunk": c} | shape for c in chunks]
    found += [{"part": "dtype", "dtype": t, "op": "la2"} | shape for t in OURS]
    found.append({"part": "dtype", "dtype": "tf32" if run.gpu else "fp32", "op": "plain PyTorch"} | shape)
    pieces = (1, 8) if run.quick else (1, 8, 64)
    found += [
        {"part": "state", "state": s, "pieces": p, "slope": x} | shape
        for x in ("zero", "layer 40 of 80")
        for p in pieces
        for s in STATES
        if p > 1 or s == "fp32"
    ]
    if run.gpu:
        wide = {"b": 8, "h": h, "n": n // 2, "d": d, "e": d}
        long = {"b": 1, "h": h, "n": 4 * n, "d": d, "e": d}
        found += [{"part": "plan", "plan": p} | s for s in (long, wide) for p in PLANS]
        dims = ((d, d // 2), (d, 2 * d), (d // 2, d // 2), (2 * d, 2 * d))
        found += [{"part": "plan", "plan": p} | shape | {"d": a, "e": b} for a, b in dims for p in SLICE_PLANS]
    if run.gpu or run.quick:  # a CPU cuts no sequence
        steep = ("zero", "layer 0 of 80", "huge")
        found += [{"part": "slopes", "slope": s, "plan": "segments=8"} | shape for s in steep]
    return found


def forced(plan: str):
    return testing.forced_plan(",".join(filter(None, [os.environ.get("LA2_PLAN"), plan])))


def _slope(name: str, heads: int, device) -> Tensor:
    if name == "zero":
        return torch.zeros(heads, device=device)
    if name == "huge":
        return torch.full((heads,), 1e4, device=device)
    return slopes.minimax(heads, int(name.split()[1]), 80).to(device)


def _inputs(run: Run, config: dict, dtype: torch.dtype) -> list[Tensor]:
    q, k, _, _ = machine.qkv(*(config[x] for x in "bhnd"), dtype, run.device, seed=1)
    _, _, v, grad_out = machine.qkv(*(config[x] for x in "bhne"), dtype, run.device, seed=2)
    return [q, k, v, grad_out]


def measure(run: Run, config: dict) -> dict:
    run.free_memory()
    return globals()[f"_{config['part']}"](run, config)


def release() -> None:
    pass


def _timed(run: Run, inputs: list[Tensor], slope: Tensor, op=None) -> dict:
    """Verdict and times of ours, or of ``op`` (q, k, v, slope)."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    peer = peers.Ours()
    if op is not None:
        peer.forward = lambda q, k, v: op(q, k, v, slope)
    peer.prepare(slope)
    out = peer.forward(*leaves)
    grads = peer.backward(out, leaves, inputs[3])
    verdict = judge(peer, dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True)), inputs, slope)
    del grads
    row = {"passed": verdict.passed, "errors": verdict.errors, "bounds": verdict.bounds}
    if not verdict.passed:
        return row

    def forward():
        with torch.no_grad():
            return peer.forward(*inputs[:3])

    row["forward_ms"] = run.median(forward)
    row["backward_ms"] = run.median(lambda: peer.backward(out, leaves, inputs[3]))
    return row


def _plan(run: Run, config: dict) -> dict:
    dtype = "bf16" if run.dtype == torch.bfloat16 else "fp16" if run.dtype == torch.float16 else "fp32"
    with forced(config["plan"]):
        try:
            row = _timed(run, _inputs(run, config, run.dtype), _slope("layer 0 of 80", config["h"], run.device))
        except RuntimeError as error:
            if "no kernel of family" in str(error) or "LA2_PLAN" in str(error):
                return {"skipped": "no such plan", "passed": True}
            raise
    if not config["plan"]:
        problem = ",".join(str(config[x]) for x in "bhnde") + f",{dtype}"
        row["plans"] = [info.plan_line(p, info.device_name(run.device)) for p in (problem, f"{problem},backward")]
    return row


def _slopes(run: Run, config: dict) -> dict:
    """A forced cut, so that there is a state pass: it leaves out what has decayed, the main pass leaves out nothing."""
    with forced(config["plan"]):
        return _timed(run, _inputs(run, config, run.dtype), _slope(config["slope"], config["h"], run.device))


def _block(run: Run, config: dict) -> dict:
    inputs = _inputs(run, config, run.dtype)
    slope = _slope("layer 0 of 80", config["h"], run.device)
    acc = slope.to(testing.accumulation_dtype(run.dtype))

    def forward():
        with torch.no_grad():
            return testing.chunked(*inputs[:3], acc, chunk=config["chunk"])[0]

    want = gate.exact(*inputs[:3], slope)["out"]
    error = testing.error(forward(), want).l2
    return {"passed": True, "errors": {"out": error}, "forward_ms": run.median(forward)}


def _share(run: Run, config: dict) -> dict:
    """The products of a forward alone, all blocks at once, by torch's matmul: those within blocks, those with "
    "states."""
    q, k, v, _ = _inputs(run, config, run.dtype)
    c, d, e = config["chunk"], config["d"], config["e"]
    q, k, v = (x.reshape(-1, c, x.shape[-1]) for x in (q, k, v))
    state = torch.randn(q.shape[0], d, e, device=run.device).to(run.dtype)

    def intra():
        return (q @ k.mT) @ v

    def inter():
        return q @ state, k.mT @ v

    intra(), inter()
    row = {"intra_ms": run.median(intra), "inter_ms": run.median(inter), "passed": True}
    return row | {"intra_share_of_time": row["intra_ms"] / (row["intra_ms"] + row["inter_ms"])}


def _state(run: Run, config: dict) -> dict:
    """Errors where the state between pieces of a sequence is kept in a dtype; the call itself keeps it in float32."""
    inputs = _inputs(run, config, run.dtype)
    slope = _slope(config["slope"], config["h"], run.device)
    narrow, outs, state = STATES[config["state"]], [], None
    for q, k, v in zip(*(x.chunk(config["pieces"], 2) for x in inputs[:3]), strict=True):
        out, state = torch.ops.la2.forward_with_state(q, k, v, slope, initial_state=state)
        outs.append(out)
        state = state.to(narrow).to(state.dtype)
    error = testing.error(torch.cat(outs, 2), gate.exact(*inputs[:3], slope)["out"]).l2
    return {"passed": True, "errors": {"out": error}}


def _dtype(run: Run, config: dict) -> dict:
    dtype = torch.float64 if config["dtype"] == "fp64" else machine.DTYPES.get(config["dtype"], torch.float32)
    inputs = _inputs(run, config, dtype)
    slope = _slope("layer 0 of 80", config["h"], run.device).to(testing.accumulation_dtype(dtype))
    if config["op"] == "la2":
        return _timed(run, inputs, slope)
    # No kernel here rounds to TF32; torch's products do, where they are asked to.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if config["dtype"] == "tf32" else "highest")
    try:
        want = gate.exact(*(x[:, [0, -1]] for x in inputs[:3]), slope[[0, -1]])["out"]

        def forward():
            with torch.no_grad():
                return testing.chunked(*inputs[:3], slope, chunk=64)[0]

        error = testing.error(forward()[:, [0, -1]], want).l2
        return {"passed": True, "errors": {"out": error}, "forward_ms": run.median(forward)}
    finally:
        torch.set_float32_matmul_precision(before)


# ---- for people


def intra_share(chunk: int, d: int, e: int) -> float:
    """Of the operations of a forward that are computed, by arithmetic."""
    return chunk * (d + e) / (chunk * (d + e) + 2 * d * e)


def _of(rows: list[dict], part: str) -> list[dict]:
    return [r for r in rows if r["part"] == part]


def summary(rows: list[dict], what: str) -> str | None:
    if what == "share":
        found = {r["chunk"]: r for r in _of(rows, "share")}
        r = found.get(64)
        if r is None:
            return None
        arithmetic = intra_share(64, r["d"], r["e"])
        return (
            f"C = 64, D = E = {r['d']}: within the block {100 * arithmetic:.0f} % of the operations, "
            f"{100 * r['intra_share_of_time']:.0f} % of the time of the products alone (torch.matmul)"
        )
    found = [r for r in _of(rows, "block") if r.get("forward_ms")]
    if not found:
        return None
    best = min(found, key=lambda r: r["forward_ms"])
    return f"see the guide in (d); in plain PyTorch {best['chunk']} is fastest, errors differ by " + (
        f"{max(r['errors']['out'] for r in found) / min(r['errors']['out'] for r in found):.2f}x"
    )


def guide(rows: list[dict]) -> str:
    """Written from the measurements; says nothing of what is not measured."""
    text = ["**Choosing the block size C.**"]
    shares = _of(rows, "share")
    if shares:
        d, e = shares[0]["d"], shares[0]["e"]
        even = 2 * d * e / (d + e)
        text.append(
            f"By arithmetic, work within the block overtakes work through the state at C = 2 D E / (D + E) = "
            f"{even:.0f} here; "
            f"below that C costs little arithmetic, above it the masked half is pure loss. The state is touched once a "
            f"block, so a small C pays in state products that are too small to fill a matrix unit."
        )
    blocks = sorted((r for r in _of(rows, "block") if r.get("forward_ms")), key=lambda r: r["chunk"])
    if len(blocks) > 1:
        errors = [r["errors"]["out"] for r in blocks]
        best = min(blocks, key=lambda r: r["forward_ms"])
        text.append(
            f"The error hardly depends on C (from {min(errors):.1e} to {max(errors):.1e} between C = "
            f"{blocks[0]['chunk']} and "
            f"{blocks[-1]['chunk']}), so C is a matter of speed alone; without a kernel, where each block is a "
            f"launch, the "
            f"fastest C was {best['chunk']}."
        )
    plans = [r for r in _of(rows, "plan") if r.get("forward_ms")]
    for shape in dict.fromkeys((r["b"], r["h"], r["n"], r["d"], r["e"]) for r in plans):
        here = [r for r in plans if (r["b"], r["h"], r["n"], r["d"], r["e"]) == shape]
        free = next((r for r in here if not r["plan"]), None)
        if free is None:
            continue
        for what in ("forward_ms", "backward_ms"):
            best = min(here, key=lambda r: r[what])
            text.append(
                f"{shape}, {what.split('_')[0]}: the planner's choice takes {free[what]:.3f} ms, the best of "
                f"{len(here)} plans ({best['plan'] or 'its own'}) {best[what]:.3f} ms."
            )
    cut = {r["slope"]: r for r in _of(rows, "slopes") if r.get("forward_ms")}
    if plans and {"zero", "huge"} <= cut.keys():
        a, b = cut["zero"], cut["huge"]
        text.append(
            "With 8 segments, decay so steep that the state pass has nothing to read saves "
            f"{100 * (1 - b['forward_ms'] / a['forward_ms']):.0f} % of the forward and "
            f"{100 * (1 - b['backward_ms'] / a['backward_ms']):.0f} % of the backward: the price of cutting a sequence "
            "that does not decay."
        )
    return "\n\n".join(text) if len(text) > 1 else ""


_HEADERS = {
    "block": ["C", "plain PyTorch ms", "error", "intra share of operations"],
    "share": ["C", "intra ms", "inter ms", "intra share of time", "of operations"],
    "dtype": ["dtype", "op", "fwd ms", "bwd ms", "error, worst"],
    "state": ["state between pieces", "pieces", "slopes", "error"],
    "plan": ["B,H,N,D,E", "LA2_PLAN", "fwd ms", "bwd ms", "error, worst"],
    "slopes": ["slopes", "LA2_PLAN", "fwd ms", "bwd ms", "error, worst"],
}


def _cells(r: dict) -> list[str]:
    part = r["part"]
    missing = r.get("skipped") or r.get("failed") or (None if r["passed"] else "WRONG RESULT")
    ms = [f"{r[x]:.3f}" if x in r else "-" for x in ("forward_ms", "backward_ms")]
    worst = f"{max(r['errors'].values()):.1e}" if r.get("errors") else "-"
    if missing:
        ms = [missing, "-"]
    if part == "block":
        return [str(r["chunk"]), ms[0], worst, f"{100 * intra_share(r['chunk'], r['d'], r['e']):.0f} %"]
    if part == "share":
        if missing:
            return [str(r["chunk"]), missing, "-", "-", "-"]
        share = f"{100 * r['intra_share_of_time']:.0f} %"
        arithmetic = f"{100 * intra_share(r['chunk'], r['d'], r['e']):.0f} %"
        return [str(r["chunk"]), f"{r['intra_ms']:.3f}", f"{r['inter_ms']:.3f}", share, arithmetic]
    if part == "state":
        return [r["state"], str(r["pieces"]), r["slope"], missing or worst]
    lead = {
        "dtype": lambda: [r["dtype"], r["op"]],
        "plan": lambda: [",".join(str(r[x]) for x in "bhnde"), r["plan"] or "(free)"],
        "slopes": lambda: [r["slope"], r["plan"]],
    }[part]()
    return [*lead, *ms, worst]


def section(rows: list[dict]) -> str:
    text = [" ".join(__doc__.split("\n\n", 1)[1].split())]
    for part, header in _HEADERS.items():
        mine = _of(rows, part)
        if mine:
            mine.sort(key=lambda r: (*(r[x] for x in "bhnde"), r.get("slope", ""), r.get("pieces", r.get("chunk", 0))))
            text.append(
                report.table(header, [_cells(r) for r in mine], texts=2 if part in ("plan", "dtype", "slopes") else 1)
            )
    if written := guide(rows):
        text.append(written)
    return "\n\n".join(text)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    made = []
    blocks = sorted((r for r in _of(rows, "block") if r.get("forward_ms")), key=lambda r: r["chunk"])
    for key, y, of in (
        ("time", "milliseconds", lambda r: r["forward_ms"]),
        ("error", "relative", lambda r: r["errors"]["out"]),
    ):
        if blocks:
            made.append(folder / f"d_block_{key}.png")
            series = {"plain PyTorch": [(r["chunk"], of(r)) for r in blocks]}
            plots.lines(made[-1], series, title=f"{key} against block size", x="C", y=y, caption=caption)
    return made
