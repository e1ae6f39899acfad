"""(b) Training speed of TransNormerLLM from 1K to 92K, beside the same model with softmax attention (the paper's Table
1), and of the 15B shape from real layers.

Whole training steps: forward, backward with every block recomputed (as TransNormerLLM is trained), AdamW. Parameters
and optimizer float32, products in the dtype of the run. No layer tables of 0.4B to 3B are at hand: their shapes are
this project's, for the parameter counts. The softmax model has no rotary embedding, which spares it work. One GPU,
nothing to communicate.
"""

from __future__ import annotations

import contextlib
import math
import pathlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...nn.parts import GroupRMSNorm
from .. import compare, machine, peers, plots, report, train
from . import claims
from .run import Run, softmax

LETTER, TITLE = "b", "Training tokens/s/GPU of TransNormerLLM against length"
VOCABULARY = 64000
LOSS_TOKENS = 4096  # whose logits are there at a time
OURS, SOFTMAX = "la2", "softmax (SDPA)"

#: 15B has the layers, heads and width of the paper.
SIZES = {
    "0.4B": train.Size(width=1024, heads=8, layers=24, hidden=2816),
    "1B": train.Size(width=2048, heads=16, layers=16, hidden=5632),
    "3B": train.Size(width=2560, heads=20, layers=32, hidden=6912),
    "15B": train.Size(width=5120, heads=40, layers=42, hidden=13824),
}
LENGTHS = {"0.4B": claims.TABLE1_LENGTHS, "1B": (1024, 8192, 32768, 81920, 94208), "3B": (1024, 8192, 32768, 94208)}
STEP_TOKENS = 32768  # or one sequence, where that is longer
FIFTEEN = {"length": 6144, "tokens": 24576, "stacks": (1, 3)}  # the paper's length; layers that are timed

SMALL = train.Size(width=64, heads=2, layers=3, hidden=96)
SMALL_VOCABULARY = 256


class Model(nn.Module):
    """train.Block as often as ``layers`` says, between a tied embedding and a loss taken some tokens at a time."""

    def __init__(self, size: train.Size, layers: int, vocabulary: int, is_softmax: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.width)
        more = {"rotary": "none"} if is_softmax else {}
        self.blocks = nn.ModuleList(train.Block(size, i, **more) for i in range(layers))
        self.norm = GroupRMSNorm(size.width, affine=False)
        for block in self.blocks:
            block.mixer.operator = _softmax if is_softmax else train.OPERATORS[train.OURS]
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((self.norm(x) @ self.embedding.weight.to(x.dtype).T).float(), targets, reduction="sum")

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N + 1]``; nats a token."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        parts = zip(x.flatten(0, 1).split(LOSS_TOKENS), tokens[:, 1:].flatten().split(LOSS_TOKENS), strict=True)
        return sum(checkpoint(self._loss, *part, use_reentrant=False) for part in parts) / tokens[:, 1:].numel()


def _softmax(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    return softmax(q, k, v, slope, 1.0)


class _Trainer:
    """The last model that was asked for, with its optimizer: the lengths of a model share it."""

    def __init__(self):
        self.key = self.model = self.optimizer = None

    def of(self, run: Run, name: str, op: str, layers: int | None = None):
        key = (name, op, layers)
        if key != self.key:
            self.release()
            run.free_memory()
            torch.manual_seed(0)
            size, vocabulary = (SMALL, SMALL_VOCABULARY) if run.small else (SIZES[name], VOCABULARY)
            with run.device:
                self.model = Model(size, layers or size.layers, vocabulary, op == SOFTMAX)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
            self.key = key
        return self.model, self.optimizer

    def release(self) -> None:
        self.key = self.model = self.optimizer = None


_trainer = _Trainer()


def release() -> None:
    _trainer.release()


def points(run: Run) -> list[dict]:
    if run.small:
        lengths = (64, 128) if run.quick else (256, 1024, 4096)
        found = [
            {"model": "tiny", "op": op, "n": n, "tokens": 2 * lengths[-1]} for op in (OURS, SOFTMAX) for n in lengths
        ]
        return [*found, {"model": "15B", "op": OURS, "n": lengths[0], "tokens": 2 * lengths[0]}]
    found = []
    for name, lengths in LENGTHS.items():
        found += [
            {"model": name, "op": op, "n": n, "tokens": max(1, STEP_TOKENS // n) * n}
            for op in (OURS, SOFTMAX)
            for n in lengths
        ]
        if name == "0.4B":
            found.append({"model": "15B", "op": OURS, "n": FIFTEEN["length"], "tokens": FIFTEEN["tokens"]})
    return found


def operator_is_right(run: Run, size: train.Size, op: str, n: int) -> dict:
    """The gate: the operator at this model's heads, output and gradients."""
    peer = peers.Ours() if op == OURS else _Sdpa()
    inputs = machine.qkv(1, size.heads, min(n, 2048), size.width // size.heads, run.dtype, run.device, seed=n)
    slope = train.Mixer(size.width, size.heads, 0, size.layers, preset="transnormer", device="meta").slope.to(
        run.device
    )
    peer.prepare(slope)
    verdict = compare.verdict_of(peer, inputs, slope, backward=True)
    return {"passed": verdict.passed, "errors": verdict.errors, "bounds": verdict.bounds}


class _Sdpa(peers.Peer):
    softmax = True

    def prepare(self, slope):
        pass

    def forward(self, q, k, v):
        return softmax(q, k, v, None, 1.0)


def step_seconds(run: Run, name: str, op: str, n: int, tokens: int, layers: int | None = None) -> tuple[float, dict]:
    """Seconds that a training step takes, the least of some, after one that is not counted; and what else was seen."""
    model, optimizer = _trainer.of(run, name, op, layers)
    batch = torch.randint(
        model.embedding.num_embeddings, (tokens // n, n + 1), device=run.device, generator=run.generator(n)
    )
    narrow = torch.autocast(run.device.type, run.dtype) if run.dtype != torch.float32 else contextlib.nullcontext()
    losses = []

    def step():
        with narrow:
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    if run.gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    taken, first = [], run.seconds(step)
    for _ in range(1 if run.quick else max(1, min(3, int(1.0 / first)))):
        taken.append(run.seconds(step))
    seen = {"loss": [x.item() for x in losses], "parameters": sum(p.numel() for p in model.parameters())}
    if run.gpu:
        seen["peak_bytes"] = torch.cuda.max_memory_allocated(run.device)
    return min(taken), seen


def measure(run: Run, config: dict) -> dict:
    name, op, n, tokens = (config[x] for x in ("model", "op", "n", "tokens"))
    size = SMALL if run.small else SIZES[name]
    result = operator_is_right(run, size, op, n)
    if not result["passed"]:
        return result
    try:
        if name == "15B":
            seconds, seen = {}, {}
            for layers in FIFTEEN["stacks"]:
                seconds[layers], seen = step_seconds(run, name, op, n, tokens, layers)
            few, many = FIFTEEN["stacks"]
            layer = (seconds[many] - seconds[few]) / (many - few)
            whole = seconds[few] + (SIZES["15B"].layers - few) * layer
            result |= {"layer_seconds": layer, "rest_seconds": seconds[few] - few * layer, "seconds": whole}
            result["extrapolated_from_layers"] = list(FIFTEEN["stacks"])
        else:
            result["seconds"], seen = step_seconds(run, name, op, n, tokens)
    except torch.OutOfMemoryError:
        release()
        raise
    result |= seen | {"tokens_per_s": tokens / result["seconds"]}
    result["passed"] = all(map(math.isfinite, seen["loss"]))
    return result


def rate(rows: list[dict], name: str, op: str, n: int) -> float | None:
    return next(
        (r["tokens_per_s"] for r in rows if (r["model"], r["op"], r["n"]) == (name, op, n) and r.get("tokens_per_s")),
        None,
    )


def section(rows: list[dict]) -> str:
    text = [" ".join(__doc__.split("\n\n", 1)[1].split())]
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == name]
        if name == "15B":
            r = mine[0]
            if r.get("tokens_per_s"):
                few, many = r["extrapolated_from_layers"]
                text.append(
                    f"15B shape, N = {r['n']:,}: {r['tokens_per_s']:,.0f} tokens/s/GPU, extrapolated: stacks of {few} "
                    f"and {many} layers were trained; a layer takes {r['layer_seconds'] * 1e3:.2f} ms for "
                    f"{r['tokens']:,} "
                    f"tokens, all else {r['rest_seconds'] * 1e3:.2f} ms, and a step of 42 layers would take "
                    f"{r['seconds']:.3f} s. What several GPUs say to each other is not in it. The paper: "
                    f"{claims.FIFTEEN_TGS:,} with its 15B model."
                )
            continue
        millions = next((r["parameters"] / 1e6 for r in mine if "parameters" in r), None)
        text.append(f"**{name}**" + (f", {millions:,.1f} M parameters" if millions else ""))
        lines = []
        for n in sorted({r["n"] for r in mine}):
            cells = [f"{n:,}"]
            for op in (OURS, SOFTMAX):
                r = next((r for r in mine if r["n"] == n and r["op"] == op), {})
                shown = r.get("skipped") or r.get("failed") or ("WRONG RESULT" if r else "not measured")
                cells.append(f"{r['tokens_per_s']:,.0f}" if r.get("tokens_per_s") else shown)
            a, b = rate(mine, name, OURS, n), rate(mine, name, SOFTMAX, n)
            cells.append(f"{a / b:.2f}x" if a and b else "-")
            cells += [claims.table1(name, model, n) for model in claims.TABLE1_MODELS]
            lines.append(cells)
        header = ["N", "la2", "softmax", "la2 is", *(f"paper: {m}" for m in claims.TABLE1_MODELS)]
        text.append(report.table(header, lines))
    text.append(f"The paper's columns: {claims.TABLE1_HARDWARE}.")
    return "\n\n".join(text)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    made = []
    for name in dict.fromkeys(r["model"] for r in rows if r["model"] != "15B"):
        series: dict[str, list[tuple[float, float]]] = {}
        for r in sorted(rows, key=lambda r: r["n"]):
            if r["model"] == name and r.get("tokens_per_s"):
                series.setdefault(r["op"], []).append((r["n"], r["tokens_per_s"]))
        if series:
            made.append(folder / f"b_training_{name}.png")
            plots.lines(made[-1], series, title=f"training, {name}", x="length", y="tokens/s/GPU", caption=caption)
    return made
