"""``python -m lightning_attn2_ext``: demo, info, check and bench."""

from __future__ import annotations

import sys
from importlib import import_module

_USAGE = """usage: python -m lightning_attn2_ext <command> [options]

  demo        train, measure and sample a small language model on this machine
  demo generate   serve requests with it: continuous batching, beams, drafts
  info        what is installed, what was loaded and what would run
  check       test this installation on every device and dtype
  bench cpu   time the operators on the CPU beside softmax attention
  bench ops   time the operators on a CUDA device beside other packages
  bench map   the fastest other package against this one over heads and lengths
  bench energy the same calls back to back: time, power and energy beside other packages
  bench scale time context parallelism on several processes, and model more of them
  bench paper the paper's claims, each measured: JSON, plots and RESULTS.md; resumes

and, on a CPU or a GPU, with tables, JSON and plots:

  bench compare   every operator that is installed here: time, memory, error
  bench speed     this operator and softmax attention over growing lengths
  bench memory    the most memory that each of them holds
  bench decode    one token for each of many sequences
  bench extend    new tokens of many requests against a pool of states
  bench accuracy  the distance of each of them from float64
  bench layer     transformers' MiniMax layer as it is and on this operator
  bench train     a language model trained with each of them from one seed
  bench plans     the planner's predictions beside the time of its plan and others
  bench calibrate the constants of the planner's cost model, on a Hopper GPU

Each takes --help."""

_TABLES = ("compare", "speed", "memory", "decode", "extend", "accuracy", "layer", "train")
_COMMANDS = {
    ("demo", "generate"): "demo.serve",
    ("demo",): "demo.cli",
    ("info",): "info",
    ("check",): "check",
    ("bench", "cpu"): "bench.cpu",
    ("bench", "ops"): "bench.ops",
    ("bench", "map"): "bench.map",
    ("bench", "calibrate"): "bench.calibrate",
    ("bench", "plans"): "bench.plans",
    ("bench", "energy"): "bench.energy",
    **{("bench", name): f"bench.{name}" for name in _TABLES},
    ("bench", "scale"): "bench.scale",
    ("bench", "paper"): "bench.paper.cli",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    for words, module in _COMMANDS.items():
        if tuple(argv[: len(words)]) == words:
            return import_module(f".{module}", __package__).main(argv[len(words) :])
    print(f"unknown command: {' '.join(argv[:2])}\n\n{_USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
