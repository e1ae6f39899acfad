"""``python -m lightning_attn2_ext demo generate``: several requests served together, from one pool of states."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import time

import torch

from ..bench import report
from . import data, engine
from .cli import _printable, preset
from .model import LanguageModel, Size
from .train import choose_threads, train


def save(model: LanguageModel, file: str | pathlib.Path) -> None:
    torch.save({"size": dataclasses.asdict(model.size), "weights": model.state_dict()}, file)


def load(file: str | pathlib.Path, device: torch.device) -> LanguageModel:
    kept = torch.load(file, map_location="cpu", weights_only=True)
    model = LanguageModel(Size(**kept["size"]))
    model.load_state_dict(kept["weights"])
    return model.to(device)


def _trained(arguments, corpus: data.Corpus, device: torch.device) -> LanguageModel:
    file = pathlib.Path(arguments.model) if arguments.model else None
    if file is not None and file.exists():
        print(f"   weights of {file}")
        return load(file, device)
    choice = preset(device, arguments.quick)
    recipe = choice.recipe
    if arguments.steps is not None:
        recipe = dataclasses.replace(recipe, steps=arguments.steps, seconds=math.inf)
    torch.manual_seed(arguments.seed)
    model = LanguageModel(choice.size).to(device)
    busy = choose_threads(model, recipe)
    if busy:
        print(f"   {busy}")
    rows = data.held_out_rows(corpus.held_out, recipe.held_out_rows, recipe.held_out_length)
    curve = train(model, corpus, rows, recipe, arguments.seed)
    print(f"   trained for {curve.steps} steps, {curve.seconds:.0f} s; last: {curve.train[-1][1]:.2f} bits per byte")
    if file is not None:
        save(model, file)
        print(f"   kept in {file}")
    return model


def prompts(held_out: torch.Tensor, count: int) -> list[bytes]:
    """Pieces of text that the model has not seen, of 8 bytes to some hundreds."""
    text = bytes(held_out[: 1 << 20].tolist())
    lengths = [8 + 61 * i * (i + 3) % 487 for i in range(count)]
    step = max(1, (len(text) - max(lengths)) // count)
    return [text[i * step : i * step + length] for i, length in enumerate(lengths)]


def _shown(text: bytes) -> str:
    return _printable(text).replace("\n", "⏎")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_attn2_ext demo generate",
        description="Trains or loads the demo's model and serves requests with it: continuous batching, beams, drafts.",
    )
    parser.add_argument("--model", help="file of weights: read if there is one, written after training if not")
    parser.add_argument("--steps", type=int, help="training steps, instead of a fixed number of them or of seconds")
    parser.add_argument("--quick", action="store_true", help="a small model and a few seconds of training")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4, help="requests that run at a time (default 4)")
    parser.add_argument("--bytes", type=int, default=64, help="to write behind each prompt, or less (default 64)")
    parser.add_argument("--device", help="default: cuda when there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-dir", help="a folder of text instead of the Python standard library")
    arguments = parser.parse_args(argv)
    for name in ("requests", "slots", "bytes", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(report.describe(report.environment()))
    print("\n1. The model", flush=True)
    corpus = data.load(arguments.text_dir, preset(device, arguments.quick).max_bytes)
    model = _trained(arguments, corpus, device).eval()
    with torch.inference_mode():  # in float32: a rounding must not decide which byte is the likeliest
        return _serve(model, prompts(corpus.held_out, arguments.requests), arguments)


def _serve(model: LanguageModel, texts: list[bytes], arguments) -> int:
    right = []

    def verdict(same: bool) -> str:
        right.append(same)
        return "yes" if same else "NO"

    print(f"\n2. {len(texts)} requests, {arguments.slots} slots")
    served = engine.Engine(model, arguments.slots)
    requests, began, steps = [], time.perf_counter(), 0
    while len(requests) < len(texts) or served.waiting or served.running:
        if len(requests) < len(texts) and steps % 3 == 0:  # they come one by one and want different numbers of bytes
            i = len(requests)
            requests.append(served.submit(texts[i], max(1, arguments.bytes - i * arguments.bytes // (2 * len(texts)))))
        served.step()
        steps += 1
    took = time.perf_counter() - began
    for request in requests:
        print(f"   {len(request.prompt):4} bytes: {_shown(request.prompt[-24:])}⟦{_shown(request.written)}⟧")
    total = sum(len(request.written) for request in requests)
    print(f"   {total} bytes in {steps} steps, {took:.2f} s; at most {served.most_running} requests at a time")
    print(f"   pool: {served.pool.memory_report()}")
    alone = [engine.one_at_a_time(model, request.prompt, request.count) for request in requests]
    same = verdict(alone == [request.written for request in requests])
    print(f"   the same bytes as one request at a time: {same}", end=" ")
    print(f"(closest choice: {min(request.margin for request in requests):.1e} between two logits)")

    longest = max(texts, key=len)
    print("\n3. Beam search: one prompt, read once, its state forked")
    beams = engine.beam_search(model, longest, arguments.bytes, 4)
    for beam in beams:
        print(f"   {beam.score:8.2f}  ⟦{_shown(beam.text)}⟧")
    off = max(abs(beam.score - engine.score(model, longest, beam.text)) for beam in beams)
    print(f"   the same scores as read at once: {verdict(off < 1e-3)} (largest difference {off:.1e})")

    print("\n4. Drafts of 4 bytes, copied from earlier text, verified together")
    drafted = engine.speculate(model, texts, arguments.bytes)
    plain = [engine.one_at_a_time(model, text, arguments.bytes) for text in texts]
    print(f"   {drafted.rounds} rounds for {arguments.bytes} bytes behind each of {len(texts)} prompts;", end=" ")
    print(f"draft bytes that were right: {sum(drafted.accepted)} of {sum(map(len, drafted.texts))} written")
    print(f"   the same bytes as without drafts: {verdict(drafted.texts == plain)}")
    return 0 if all(right) else 1
