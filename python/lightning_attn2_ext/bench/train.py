"""``bench train``: one language model, trained from one seed on one text with each operator in turn.

The model is in the manner of TransNormerLLM (40 million parameters, bytes for tokens). The operators see the same
batches
and start from the same weights, so their loss curves show what their rounding does to training: they are compared, step
by step, with those of the recurrence in chunks of plain PyTorch in float32 ("reference"). --json is written after each
operator; --resume takes from it what was trained there already, so that a run may be cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import testing
from ..demo import data, progress
from ..nn import LightningAttention
from ..nn.attention import activate
from ..nn.parts import GroupRMSNorm
from . import entries, machine, peers, plots, report

#: How far a loss may be from the reference's at any step.
LIMIT = 0.005
REFERENCE, OURS, OFFICIAL = "reference", "la2", "lightning_attn"


@dataclasses.dataclass(frozen=True)
class Size:
    width: int = 512
    heads: int = 4
    layers: int = 12
    hidden: int = 1408
    # Training amplifies every rounding, the more the higher the rate: at 5e-5 the distance of two float32 trainings
    # whose operators differ by 2e-7 doubles every step from the 63rd on, at 1e-5 bfloat16 ones are 7e-4 apart for 100
    # steps and 0.06 at the 159th, at 3e-6 within 8e-4 for 180 steps and 0.012 at the 267th, at 1.5e-6 within 5e-4
    # for 200 steps and 0.002 at the last. That says nothing about an operator, hence many bytes and a low rate.
    rows: int = 32
    length: int = 1024
    steps: int = 300
    rate: float = 1.5e-6
    warmup: int = 100


QUICK = Size(width=64, heads=2, layers=2, hidden=96, rows=2, length=96, steps=6, rate=3e-4, warmup=6)

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _ours(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    return torch.ops.la2.forward(q, k, v, slope)


def _reference(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return testing.chunked(q.float(), k.float(), v.float(), slope, chunk=128)[0].to(v.dtype)


def _official(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    import importlib

    function = importlib.import_module(peers.LightningAttn.module).lightning_attn_func
    return function(q.contiguous(), k.contiguous(), v.contiguous(), slope[:, None, None].contiguous())


OPERATORS: dict[str, Operator] = {REFERENCE: _reference, OURS: _ours, OFFICIAL: _official}


class Mixer(LightningAttention):
    """TransNormerLLM's token mixer with the operator to be chosen."""

    operator: Operator = staticmethod(_ours)

    def _attend(self, q, k, v, silu, mask, cu_seqlens, state) -> Tensor:
        q, k, v = activate(q, k, v, silu)
        # Under autocast the rotation of the first layer and the projections agree on no dtype.
        if torch.is_autocast_enabled(q.device.type):
            q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
        return self.operator(q, k, v, self.slope)


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + down(up(x) * gate(x))``: TransNormerLLM's SGLU has no activation."""

    def __init__(self, size: Size, layer_idx: int, **overrides):
        super().__init__()
        self.mixer = Mixer(size.width, size.heads, layer_idx, size.layers, preset="transnormer", **overrides)
        self.mixer_norm = GroupRMSNorm(size.width, affine=False)
        self.unit_norm = GroupRMSNorm(size.width, affine=False)
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        gate, up = self.gate_up(self.unit_norm(x)).chunk(2, -1)
        return x + self.down(gate * up)


class LanguageModel(nn.Module):
    def __init__(self, size: Size, operator: Operator):
        super().__init__()
        self.embedding = nn.Embedding(256, size.width)
        self.blocks = nn.ModuleList(Block(size, i) for i in range(size.layers))
        self.norm = GroupRMSNorm(size.width, affine=False)
        self.head = nn.Linear(size.width, 256, bias=False)
        for block in self.blocks:
            block.mixer.operator = operator
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out_proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * size.layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def train(name: str, size: Size, text: Tensor, dtype: torch.dtype, device: torch.device, seed: int) -> dict:
    """The losses, in nats a byte, of every step, and the median seconds that a step took."""
    torch.manual_seed(seed)
    model = LanguageModel(size, OPERATORS[name]).to(device)
    generator = torch.Generator().manual_seed(seed)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    narrow = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    losses, times = [], []
    bar = progress.bar(size.steps)
    for step in range(size.steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = size.rate * min(1.0, (step + 1) / size.warmup)
        batch = data.batch(text, size.rows, size.length, generator).to(device)
        with narrow:
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        bar.set_postfix_str(f"{name}: {losses[-1]:.4f}", refresh=False)
        bar.update(1)
    bar.close()
    middle = sorted(times)[len(times) // 2]
    return {
        "op": name,
        "losses": losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_a_step": middle,
        "tokens_per_s": size.rows * size.length / middle,
    }


def compare(rows: list[dict]) -> None:
    """Adds to each row how far its losses are from the reference's, and whether that is within the limit."""
    reference = next(r for r in rows if r["op"] == REFERENCE)["losses"]
    for row in rows:
        gaps = [abs(a - b) for a, b in zip(row["losses"], reference, strict=True)]
        worst = max(gaps)
        row |= {"gap": worst, "gap_step": gaps.index(worst), "finite": all(map(math.isfinite, row["losses"]))}
        row["passed"] = row["finite"] and worst < LIMIT


#: What has to be the same where a row of an earlier run is taken over.
SAME = ("commit", "device", "gpu", "torch", "dtype", "size", "text", "seed")


def trained_before(path: pathlib.Path, facts: dict) -> dict[str, dict]:
    """The rows that a run like this one has left there, by operator."""
    if not path.exists():
        return {}
    recorded = json.loads(path.read_text())
    if any(recorded["environment"].get(key) != facts.get(key) for key in SAME):
        return {}
    return {row["op"]: row for row in recorded["results"]}


def table(rows: list[dict]) -> str:
    lines = [
        [
            r["op"],
            f"{r['losses'][0]:.4f}",
            f"{r['losses'][-1]:.4f}",
            f"{r['gap']:.5f}" if r["op"] != REFERENCE else "-",
            str(r["gap_step"]) if r["op"] != REFERENCE else "-",
            f"{r['tokens_per_s']:,.0f}",
        ]
        for r in rows
    ]
    return report.table(["operator", "first loss", "last loss", "largest gap", "at step", "tokens/s"], lines)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    curves = {r["op"]: list(enumerate(r["losses"])) for r in rows}
    reference = next(r for r in rows if r["op"] == REFERENCE)["losses"]
    gaps = {
        f"{r['op']} - reference": [(i, a - b) for i, (a, b) in enumerate(zip(r["losses"], reference, strict=True))]
        for r in rows
        if r["op"] != REFERENCE
    }
    options = {"x": "step", "caption": caption, "log_x": False, "log_y": False, "dots": False}
    made = [folder / "train_loss.png", folder / "train_gap.png"]
    plots.lines(made[0], curves, title="training loss", y="nats per byte", **options)
    plots.lines(made[1], gaps, title=f"distance from the reference (limit {LIMIT})", y="nats per byte", **options)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench train", description=__doc__)
    machine.add_arguments(parser)
    parser.add_argument("--steps", type=int, help="default 300")
    parser.add_argument("--rows", type=int, help="sequences a step (default 32)")
    parser.add_argument("--length", type=int, help="bytes of a sequence (default 1024)")
    parser.add_argument("--rate", type=float, help="learning rate (default 1.5e-6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-dir", help="a folder of text (default: the sources of Python's standard library)")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, help="beside the reference, which always runs")
    parser.add_argument("--resume", action="store_true", help="go on from what --json has, if the run is the same")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.json:
        parser.error("--resume goes on from a file: --json OUT")
    device, dtype, facts = machine.open_machine(arguments)
    given = {n: getattr(arguments, n) for n in ("steps", "rows", "length", "rate") if getattr(arguments, n)}
    size = dataclasses.replace(QUICK if arguments.quick else Size(), **given)
    corpus = data.load(arguments.text_dir, max_bytes=2_000_000 if arguments.quick else None)
    _, facts["peers"] = entries.choose(device, dtype, None, entries=(peers.LightningAttn,))
    names = [REFERENCE, OURS]
    if not facts["peers"][peers.LightningAttn.name].startswith("skipped"):
        names.append(OFFICIAL)
    if arguments.only:
        names = [n for n in names if n == REFERENCE or n in arguments.only]
    text = arguments.text_dir or "Python standard library sources"
    facts |= {"size": dataclasses.asdict(size), "text": text, "seed": arguments.seed}
    done = trained_before(pathlib.Path(arguments.json), facts) if arguments.resume else {}
    rows = []
    for name in names:
        rows.append(done.get(name) or train(name, size, corpus.train, dtype, device, arguments.seed))
        compare(rows)
        if arguments.json:
            report.write_json(arguments.json, "train", facts, rows)
    millions = rows[0]["parameters"] / 1e6
    caption = (
        f"{millions:.1f} M parameters, {size.rows} x {size.length} bytes a step, {facts['dtype']}, "
        f"{facts.get('gpu', facts['cpu'])}"
    )
    print(f"\n{caption}; {text}\n\n{table(rows)}")
    if arguments.plots:
        reason = plots.missing()
        made = [] if reason else draw(pathlib.Path(arguments.plots), rows, caption)
        print(f"no plots: {reason}" if reason else "drew " + ", ".join(map(str, made)))
    return 0 if all(r["passed"] for r in rows if r["op"] == OURS) else 1
