"""Training, and the measurement on held-out text."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from . import data, progress
from .model import HISTORY, LanguageModel, with_history

if TYPE_CHECKING:
    from .parallel import Parallel


@dataclasses.dataclass(frozen=True)
class Recipe:
    rows: int
    length: int
    steps: int
    seconds: float  # training stops at steps or at seconds, whichever comes first
    rate: float
    held_out_rows: int
    held_out_length: int


@dataclasses.dataclass
class Curve:
    """Bits per byte over the bytes read so far."""

    train: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0


def autocast(device: torch.device):
    """bfloat16 matrix products on a GPU; the op then gets bfloat16 q, k, v. Float32 on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def _rate(step: int, done: float) -> float:
    """Share of the full learning rate: warm up over 20 steps, hold, then fall linearly from 40 % of the way on."""
    return min(1.0, (step + 1) / 20) * min(1.0, 0.03 + 0.97 * (1.0 - done) / 0.6)


def held_out_bits(model: LanguageModel, rows: torch.Tensor, segment: int = 1024) -> tuple[float, list[float]]:
    """Bits per byte over ``rows [R, N]`` uint8, and the same for each segment of their length.

    The rows are read in segments, the state carried from one to the next: what a model of any context length costs.
    """
    device = model.head.weight.device
    tokens = with_history(rows.long()).to(device)
    states, sums, counts = model.new_states(len(rows)), [], []
    model.eval()
    with torch.inference_mode(), autocast(device):
        length = rows.shape[1]
        for start in range(0, length, segment):
            stop = min(start + segment, length)
            logits, states = model.prefill(tokens[:, start : HISTORY + stop], states)
            # The byte behind each position; the very last byte of a row has none.
            want = tokens[:, HISTORY + start + 1 : HISTORY + stop + 1]
            logits = logits[:, : want.shape[1]]
            if want.numel():
                sums.append(F.cross_entropy(logits.float().flatten(0, 1), want.flatten(), reduction="sum").item())
                counts.append(want.numel())
    model.train()
    by_segment = [s / n / math.log(2) for s, n in zip(sums, counts, strict=True)]
    return sum(sums) / sum(counts) / math.log(2), by_segment


def choose_threads(model: LanguageModel, recipe: Recipe) -> str | None:
    """On a CPU that other programs keep busy, threads that wait for each other can be many times slower than one.

    Times a few steps with one thread and with all, keeps the faster, and says so where that is one.
    """
    threads = torch.get_num_threads()
    if model.head.weight.device.type != "cpu" or threads == 1:
        return None
    tokens = torch.zeros(recipe.rows, recipe.length + HISTORY, dtype=torch.int64)
    taken: dict[int, float] = {}
    for number in (1, threads):
        torch.set_num_threads(number)
        times: list[float] = []
        while len(times) < 4 and not (times and number > 1 and min(times) > 3 * taken[1]):
            before = time.perf_counter()
            torch.autograd.grad(model(tokens).logsumexp(-1).mean(), list(model.parameters()))
            times.append(time.perf_counter() - before)
        taken[number] = statistics.median(times)
    if taken[1] < taken[threads]:
        torch.set_num_threads(1)
        return (
            f"busy machine: {taken[threads]:.2f} s a step on {threads} threads, {taken[1]:.2f} s on one, so one it is"
        )
    return None


def train(
    model: LanguageModel,
    corpus: data.Corpus,
    held_out: torch.Tensor,
    recipe: Recipe,
    seed: int,
    parallel: Parallel | None = None,
) -> Curve:
    """Every process of `parallel` draws the same windows and keeps the same parameters; only the first measures."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    tables = list(model.embedding.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("embedding.")]
    groups = [
        {"params": tables, "weight_decay": 0.0},
        {"params": [p for p in others if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=True)
    curve, smooth, fastest, slow = Curve(), None, math.inf, 0
    every = max(1, recipe.steps // 5)
    start, spent_measuring = time.perf_counter(), 0.0
    bar = progress.bar(recipe.steps)
    for step in range(recipe.steps):
        elapsed = time.perf_counter() - start - spent_measuring
        done = max(step / recipe.steps, elapsed / recipe.seconds)
        if parallel is not None and not math.isinf(recipe.seconds):
            done = parallel.as_first(done)
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _rate(step, done)
        step_began = time.perf_counter()
        window = data.batch(corpus.train, recipe.rows, recipe.length + HISTORY, generator).to(device)
        tokens, labels = (window[:, :-1], window[:, HISTORY + 1 :]) if parallel is None else parallel.cut(window)
        with autocast(device):
            logits = model(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        loss = loss / (recipe.rows * recipe.length)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if parallel is not None:
            loss = loss.detach()
            parallel.sum(loss, *(p.grad for p in model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen = (step + 1) * recipe.rows * recipe.length
        curve.steps = step + 1
        if step % 5 == 0 or device.type == "cpu":  # reading the loss waits for a GPU
            bits = loss.item() / math.log(2)
            if not math.isfinite(bits):
                raise SystemExit(f"demo: the loss is {bits} at step {step}")
            smooth = bits if smooth is None else 0.9 * smooth + 0.1 * bits
            curve.train.append((seen, bits))
            bar.set_postfix_str(f"{smooth:.3f} bits/byte", refresh=False)
        bar.update(1)
        if device.type == "cpu":
            took = time.perf_counter() - step_began
            fastest = min(fastest, took)
            slow = slow + 1 if took > 5 * fastest else 0
            if slow == 3:  # others have begun to use this machine
                choose_threads(model, recipe)
        if (step + 1) % every == 0 and step + 1 < recipe.steps and (parallel is None or parallel.rank == 0):
            before = time.perf_counter()
            curve.held_out.append((seen, held_out_bits(model, held_out)[0]))
            spent_measuring += time.perf_counter() - before
    bar.close()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    curve.seconds = time.perf_counter() - start - spent_measuring
    return curve
