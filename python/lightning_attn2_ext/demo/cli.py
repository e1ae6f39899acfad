"""``python -m lightning_attn2_ext demo``: the whole story, told as it happens."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import time

import torch

from ..bench import report
from . import data, plot, speed
from .generate import agreement, generate
from .model import LanguageModel, Size
from .train import Recipe, choose_threads, held_out_bits, train


@dataclasses.dataclass(frozen=True)
class Preset:
    size: Size
    recipe: Recipe
    max_bytes: int | None
    lengths: list[int]
    budget: float  # seconds that one call in the speed test may take
    sample: int
    deep: int  # bytes behind which the second decode time is taken


def _doubling(first: int, last: int) -> list[int]:
    return [first << i for i in range((last // first).bit_length())]


def preset(device: torch.device, quick: bool) -> Preset:
    if quick:
        return Preset(
            Size(layers=2, heads=2, head_dim=32, hidden=128, ngram_rows=4096),
            Recipe(rows=4, length=128, steps=30, seconds=20, rate=4e-3, held_out_rows=4, held_out_length=1024),
            max_bytes=1_000_000,
            lengths=_doubling(256, 1024),
            budget=0.5,
            sample=40,
            deep=2048,
        )
    if device.type == "cuda":
        return Preset(
            Size(layers=8, heads=8, head_dim=64, hidden=1408, ngram_rows=65536),
            Recipe(rows=32, length=1024, steps=1000, seconds=150, rate=1e-3, held_out_rows=32, held_out_length=8192),
            max_bytes=None,
            lengths=_doubling(1024, 262144),
            budget=1.0,
            sample=400,
            deep=65536,
        )
    return Preset(
        Size(layers=3, heads=4, head_dim=32, hidden=256, ngram_rows=32768),
        Recipe(rows=4, length=256, steps=1000, seconds=65, rate=4e-3, held_out_rows=16, held_out_length=8192),
        max_bytes=None,
        lengths=_doubling(1024, 131072),
        budget=4.0,
        sample=300,
        deep=65536,
    )


def _printable(text: bytes) -> str:
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in text.decode("utf-8", "replace"))


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s / 1e6:.2f} M" if tokens_per_s >= 1e6 else f"{tokens_per_s / 1e3:.0f} K"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_attn2_ext demo",
        description="Trains a small byte-level language model on text of this machine, measures and samples it.",
    )
    parser.add_argument("--steps", type=int, help="training steps, instead of a fixed number of them or of seconds")
    parser.add_argument("--out", default="la2_demo", help="folder for plot, sample and summary (default la2_demo)")
    parser.add_argument("--device", help="default: cuda when there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-dir", help="a folder of text instead of the Python standard library")
    parser.add_argument("--quick", action="store_true", help="a few seconds: to see that everything runs")
    parser.add_argument(
        "--context-parallel", action="store_true", help="split every window over the processes of torchrun"
    )
    parser.add_argument(
        "--float64",
        action="store_true",
        help="train in float64, on the CPU: to compare runs, since in float32 the optimizer makes a rounding visible",
    )
    arguments = parser.parse_args(argv)
    if not arguments.context_parallel:
        return _tell(parser, arguments)
    from . import parallel

    with parallel.only_first_speaks():
        return _tell(parser, arguments)


def _device(arguments) -> torch.device:
    if arguments.context_parallel and not arguments.device:
        from . import parallel

        return parallel.device()
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _train_together(model, corpus, rows, recipe, seed: int):
    """`train` with the tokens of every window split; (rank, curve)."""
    from . import parallel

    together = parallel.from_environment(recipe.length)
    print(f"   windows split over {together.world} processes: {together.lengths} bytes", flush=True)
    together.split(model)
    curve = train(model, corpus, rows, recipe, seed, together)
    together.whole(model)
    torch.distributed.destroy_process_group()
    return together.rank, curve


def _tell(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    device = _device(arguments)
    if arguments.float64 and device.type != "cpu":
        parser.error(f"--float64 is for the CPU, expected --device cpu beside it, not {device}")
    began = time.perf_counter()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    choice = preset(device, arguments.quick)
    size, recipe = choice.size, choice.recipe
    if arguments.steps is not None:
        if arguments.steps < 1:
            parser.error(f"--steps is {arguments.steps}, expected at least 1")
        recipe = dataclasses.replace(recipe, steps=arguments.steps, seconds=math.inf)
    facts = report.environment()
    print(report.describe(facts))

    print("\n1. The text")
    corpus = data.load(arguments.text_dir, choice.max_bytes)
    if len(corpus.train) <= recipe.length + 8:
        raise SystemExit(f"demo: {len(corpus.train)} bytes to train on are too few; give --text-dir")
    rows = data.held_out_rows(corpus.held_out, recipe.held_out_rows, recipe.held_out_length)
    held_bytes = bytes(rows.flatten().tolist())
    order0, packed = data.order0_entropy(held_bytes), data.compressed_bits_per_byte(held_bytes)
    print(f"   {corpus.name}")
    print(f"   training: {corpus.num_train_files} files, {len(corpus.train) / 1e6:.1f} MB;", end=" ")
    print(f"held out: {corpus.num_held_out_files} other files, of which {len(held_bytes):,} bytes are measured")

    print("\n2. The operator on this device")
    error, bound = speed.checked(size, device)
    verdict = "right" if error.within(bound) else "WRONG"
    print(f"   torch.ops.la2.forward against the float64 recurrence: {verdict},", end=" ")
    print(f"relative error {error.l2:.1e} (may be {bound.l2:.1e})")
    if not error.within(bound):
        print("   stopping here: `python -m lightning_attn2_ext check` says more")
        return 1

    torch.manual_seed(arguments.seed)
    model = LanguageModel(size).to(device, torch.float64 if arguments.float64 else torch.float32)
    tables = sum(p.numel() for p in model.embedding.parameters())
    dense = sum(p.numel() for p in model.parameters()) - tables
    print("\n3. Training")
    print(f"   {size.layers} layers, {size.heads} heads of {size.head_dim}: {dense / 1e6:.2f} M weights", end=" ")
    print(f"and {tables / 1e6:.1f} M in byte and n-gram tables; windows of {recipe.length} bytes, {recipe.rows} a step")
    stop = "" if math.isinf(recipe.seconds) else f" or {recipe.seconds:.0f} s, whichever comes first"
    number = "bfloat16 autocast" if device.type == "cuda" else "float64" if arguments.float64 else "float32"
    print(f"   {recipe.steps} steps{stop}; {number}", flush=True)
    busy = choose_threads(model, recipe)
    if busy:
        print(f"   {busy}", flush=True)
    if arguments.context_parallel:
        rank, curve = _train_together(model, corpus, rows, recipe, arguments.seed)
        if rank > 0:
            return 0
    else:
        curve = train(model, corpus, rows, recipe, arguments.seed)
    if torch.get_num_threads() != facts["threads"]:
        facts["threads"] = torch.get_num_threads()
        print(f"   threads from here on: {facts['threads']}")
    seen = curve.steps * recipe.rows * recipe.length
    bits, by_segment = held_out_bits(model, rows)
    curve.held_out.append((seen, bits))
    print(f"   {curve.steps} steps, {seen / 1e6:.2f} MB read in {curve.seconds:.0f} s", end=" ")
    print(f"({seen / curve.seconds:,.0f} bytes/s); held out: {bits:.3f} bits per byte")
    if len(by_segment) > 1:
        later = sum(by_segment[1:]) / len(by_segment[1:])
        print(
            f"   the first 1,024 bytes of a row {by_segment[0]:.3f}, the rest of its {rows.shape[1]:,} {later:.3f};",
            end=" ",
        )
        print(f"a training window has {recipe.length}")

    print("\n4. Speed against length (forward of the mixer alone, one sequence)")
    points = speed.curve(size, choice.lengths, device, choice.budget)
    softmax = dict(points[speed.SOFTMAX])
    table = []
    for length, rate in points[speed.OURS]:
        other = softmax.get(length)
        shown = [_rate(other), f"{rate / other:.1f}x"] if other else [f"not run: over {choice.budget:g} s a call", "-"]
        table.append([f"{length:,}", _rate(rate), *shown])
    print(report.table(["tokens", "la2 tokens/s", "softmax tokens/s", "la2 is"], table))

    print("\n5. Writing on from a held-out file")
    prompt = held_bytes[: min(512, len(held_bytes) // 2)]
    cut = prompt.rfind(b"\n") + 1
    prompt = prompt[:cut] if cut > 64 else prompt
    with torch.inference_mode():
        apart = agreement(model, prompt[:128])
    print(f"   decode step by step and prefill at once differ by {apart:.1e} in the logits")
    sample, per_byte = generate(model, prompt, choice.sample, seed=arguments.seed)
    shown = _printable(prompt[-160:]) + "⟦" + _printable(sample) + "⟧"
    print("\n".join("   │ " + line for line in shown.splitlines()))
    near, far = speed.step_seconds(model, 64), speed.step_seconds(model, choice.deep)
    state_bytes = sum(s.numel() * s.element_size() for s in model.new_states(1))
    print(f"   one more byte behind 64 bytes: {near * 1e3:.2f} ms;", end=" ")
    print(f"behind {choice.deep:,} bytes: {far * 1e3:.2f} ms; all it remembers: {state_bytes / 1024:.0f} KiB")

    baselines = {"order-0 entropy": order0, **packed}
    took = time.perf_counter() - began
    chip = facts["gpu"] if device.type == "cuda" else f"{facts['cpu']}, CPU threads: {facts['threads']}"
    caption = f"{chip}, torch {facts['torch']}"
    missing = plot.draw(out / "constant_speed.png", points, curve, {"zlib -9": packed["zlib -9"]}, caption)
    (out / "sample.txt").write_bytes(prompt + b"\n>>>>>>>> written by the model from here\n" + sample + b"\n")
    summary = {
        "environment": facts,
        "corpus": corpus.name,
        "seed": arguments.seed,
        "size": dataclasses.asdict(size),
        "steps": curve.steps,
        "bytes_read": seen,
        "training_bits_per_byte": curve.train,
        "training_seconds": curve.seconds,
        "training_bytes_per_s": seen / curve.seconds,
        "held_out_bytes": len(held_bytes),
        "held_out_bits_per_byte": bits,
        "held_out_bits_per_byte_by_1024": by_segment,
        "baselines_bits_per_byte": baselines,
        "mixer_tokens_per_s": points,
        "decode_seconds_behind": {"64": near, str(choice.deep): far},
        "seconds": took,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    print("\n6. Summary")
    named = [[name, f"{value:.3f}"] for name, value in {"this model": bits, **baselines}.items()]
    print(report.table([f"the same {len(held_bytes):,} held-out bytes", "bits per byte"], named))
    print("   The model has read the training files before; the compressors know nothing but these bytes.")
    if missing:
        print(f"   no plot: {missing}")
    files = [name for name in ("constant_speed.png", "sample.txt", "summary.json") if (out / name).exists()]
    print(f"   {took:.0f} s in all; wrote {', '.join(str(out / name) for name in files)}")
    return 0
