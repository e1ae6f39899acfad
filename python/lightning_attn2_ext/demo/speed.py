"""Tokens per second of the token mixer alone at growing lengths, beside torch's softmax attention."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from .. import slopes, testing
from ..bench.timing import CudaClock, cpu_medians, keep_freed_memory
from .model import Size

OURS, SOFTMAX = "la2", "softmax"


def _inputs(size: Size, length: int, device: torch.device, seed: int):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = torch.randn(3, 1, size.heads, length, size.head_dim, generator=generator, device=device)
    return F.silu(q).to(dtype), F.silu(k).to(dtype), v.to(dtype)


def checked(size: Size, device: torch.device) -> tuple[testing.Error, testing.Bound]:
    """The error of the op against the float64 recurrence, and what this dtype may cost."""
    q, k, v = _inputs(size, 300, device, seed=1)
    slope = slopes.minimax(size.heads, 0, size.layers, device=device)
    with torch.inference_mode():
        want = {"out": testing.recurrence(q, k, v, slope)[0]}
        plain = [{"out": testing.chunked(q, k, v, slope, chunk=c)[0]} for c in testing.CHUNKS]
        return testing.error(torch.ops.la2.forward(q, k, v, slope), want["out"]), testing.bounds(want, plain)["out"]


def curve(size: Size, lengths: list[int], device: torch.device, budget: float) -> dict[str, list[tuple[int, float]]]:
    """(length, tokens per second) of both; an operator leaves the race when one call would take over ``budget`` s."""
    slope = slopes.minimax(size.heads, 0, size.layers, device=device)
    functions = {
        OURS: lambda x: torch.ops.la2.forward(*x, slope),
        SOFTMAX: lambda x: F.scaled_dot_product_attention(*x, is_causal=True),
    }
    clock = CudaClock(device) if device.type == "cuda" else None
    keep_freed_memory()  # the operators are compared, not how fast the system zeroes pages
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in functions}
    last: dict[str, float] = {}
    with torch.inference_mode():
        for length in lengths:
            for name, function in functions.items():
                # Doubling the length doubles the work of the one and quadruples that of the other.
                expected = last.get(name, 0.0) * (2 if name == OURS else 4)
                if expected > budget:
                    continue
                if clock is not None:
                    x = _inputs(size, length, device, seed=length)
                    seconds = clock.median(lambda x=x, f=function: f(x), repeats=10) * 1e-3
                else:
                    repeats = 5 if expected < 0.2 else 3 if expected < 0.8 else 1
                    seconds = cpu_medians(
                        {name: function},
                        lambda i, n=length: _inputs(size, n, device, seed=i),
                        repeats,
                        warmup=1 if repeats > 1 else 0,
                    )[name]
                last[name] = seconds
                points[name].append((length, length / seconds))
    return points


def step_seconds(model, length: int) -> float:
    """Median seconds that the model takes for one more byte behind a state that holds ``length`` bytes."""
    from .model import HISTORY

    device = model.head.weight.device
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(256, (1, HISTORY + length), generator=generator).to(device)
    model.eval()
    with torch.inference_mode():
        states = model.new_states(1)
        for start in range(0, length, 4096):
            _, states = model.prefill(tokens[:, start : start + HISTORY + 4096], states)
        taken = []
        for i in range(60):
            before = time.perf_counter()
            model.decode(tokens[:, i : i + HISTORY + 1], states)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - before)
    model.train()
    return sorted(taken)[len(taken) // 2]
