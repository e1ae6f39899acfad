"""Writing on from a prompt: forward_with_state reads it, decode adds one byte at a time to the state."""

from __future__ import annotations

import time

import torch

from .model import HISTORY, LanguageModel, with_history
from .train import autocast


def generate(
    model: LanguageModel, prompt: bytes, count: int, *, temperature: float = 0.7, seed: int = 0
) -> tuple[bytes, float]:
    """``count`` sampled bytes that continue ``prompt``, and the median seconds that one takes."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    recent = with_history(torch.tensor([list(prompt)], dtype=torch.int64)).to(device)
    written, seconds = bytearray(), []
    model.eval()
    with torch.inference_mode(), autocast(device):
        logits, states = model.prefill(recent, model.new_states(1))
        logits = logits[:, -1]
        for _ in range(count):
            before = time.perf_counter()
            probabilities = torch.softmax(logits[0].float() / temperature, 0).cpu()  # also waits for a GPU
            token = torch.multinomial(probabilities, 1, generator=generator)
            written.append(int(token))
            recent = torch.cat([recent[:, -HISTORY:], token[None].to(device)], 1)
            logits = model.decode(recent, states)
            seconds.append(time.perf_counter() - before)
    model.train()
    return bytes(written), sorted(seconds)[len(seconds) // 2]


def agreement(model: LanguageModel, text: bytes) -> float:
    """Largest difference between the logits of decode, byte by byte, and of one prefill of the same text."""
    device = model.head.weight.device
    tokens = with_history(torch.tensor([list(text)], dtype=torch.int64)).to(device)
    model.eval()
    with torch.inference_mode():
        whole, _ = model.prefill(tokens, model.new_states(1))
        states = model.new_states(1)
        steps = [model.decode(tokens[:, i : i + HISTORY + 1], states) for i in range(len(text))]
    model.train()
    return (torch.stack(steps, 1) - whole).abs().max().item()
