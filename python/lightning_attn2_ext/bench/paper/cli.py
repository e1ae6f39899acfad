"""``bench paper``: what the papers claim and what they leave open, measured on this machine.

Every measured point is a file under --out as soon as it is there: a run that is interrupted goes on where it was, a
point is measured again when the commit, the machine or LA2_PLAN is another (changes that are not committed make one
commit with a "+": --again). RESULTS.md and plots are made of the files.
"""

from __future__ import annotations

import argparse
import time

import torch

from ...demo import progress
from .. import machine
from . import results
from .results import EXPERIMENTS
from .run import Run
from .store import Store, where

#: What an experiment may take of the time that is left, relative to the others.
SHARES = {"b": 3.0, "f": 1.5}


def to_do(run: Run, letter: str, again: bool, missing: bool) -> list[dict]:
    """The points to be measured: all, those that no commit has, or those that this one has not."""
    points = EXPERIMENTS[letter].points(run)
    if missing:
        there = [r["config"] for r in run.store.records(letter) if "failed" not in r["result"]]
        return [c for c in points if c not in there]
    return [c for c in points if again or not run.store.has(letter, c)]


def measure(
    run: Run, letter: str, deadline: float, again: bool = False, missing: bool = False
) -> tuple[int, int, list[str]]:
    """Measures what is to do until the deadline: (measured, left out, what went wrong with our own operator)."""
    module, wrong = EXPERIMENTS[letter], []
    todo = to_do(run, letter, again, missing)
    bar = progress.bar(len(todo), unit="point")
    done = 0
    for config in todo:
        if time.monotonic() > deadline:
            break
        shown = ", ".join(str(v) for v in config.values())
        bar.set_postfix_str(f"({letter}) {shown[:60]}", refresh=True)
        start = time.perf_counter()
        try:
            result = module.measure(run, config)
        except torch.OutOfMemoryError:
            result = {"skipped": "out of memory", "passed": True}
        except Exception as error:  # one point that cannot be must not end the run
            result = {"failed": f"{type(error).__name__}: {error}".splitlines()[0], "passed": False}
        if "failed" in result or "skipped" in result:  # only now is the error gone, and with it what its frames held
            module.release()
            run.free_memory()
        run.store.write(letter, config, result, time.perf_counter() - start, run.facts)
        if not result["passed"]:
            said = f"({letter}) {shown}: {result.get('failed') or 'WRONG RESULT, no figures'}"
            print(said)
            if str(config.get("op", "la2")).startswith("la2"):
                wrong.append(said)
        done += 1
        bar.update(1)
    bar.close()
    module.release()
    run.free_memory()
    return done, len(todo) - done, wrong


def _letters(text: str) -> list[str]:
    found = [x.strip() for x in text.split(",") if x.strip()]
    for x in found:
        if x not in EXPERIMENTS:
            raise argparse.ArgumentTypeError(f"{x!r}, expected letters of {','.join(EXPERIMENTS)}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_attn2_ext bench paper",
        description=__doc__ + "\n\n" + "\n".join(f"  {x}: {m.TITLE}" for x, m in EXPERIMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    machine.add_arguments(parser, outputs=False)
    parser.add_argument("--only", type=_letters, metavar="a,b,...", help="these experiments (default: all)")
    parser.add_argument("--out", metavar="DIR", help="default: la2_paper, with --quick la2_paper_quick")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="stop measuring after so many; the report says what is left"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--again", action="store_true", help="measure what is there already too")
    which.add_argument("--missing", action="store_true", help="leave what any commit measured here as it is")
    parser.add_argument("--report", action="store_true", help="measure nothing, write RESULTS.md from the files")
    arguments = parser.parse_args(argv)
    out = arguments.out or ("la2_paper_quick" if arguments.quick else "la2_paper")
    if arguments.report:
        print(f"wrote {results.write(Store(out))}")
        return 0
    device, dtype, facts = machine.open_machine(arguments)
    run = Run(device, dtype, arguments.quick, facts, Store(out, where(facts, arguments.quick), facts["commit"]))
    letters = arguments.only or list(EXPERIMENTS)
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    wrong, left = [], 0
    try:
        run.store.plan({letter: module.points(run) for letter, module in EXPERIMENTS.items()})
        for i, letter in enumerate(letters):
            now = time.monotonic()
            rest = sum(SHARES.get(x, 1.0) for x in letters[i:])
            deadline = end if end == float("inf") else now + max(0.0, end - now) * SHARES.get(letter, 1.0) / rest
            done, out_of_time, errors = measure(run, letter, deadline, arguments.again, arguments.missing)
            wrong += errors
            left += out_of_time
            print(f"({letter}) {EXPERIMENTS[letter].TITLE}: {done} measured, {out_of_time} left out", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here")
        results.write(run.store)
        return 130
    print(f"wrote {results.write(run.store)}" + (f"; {left} points left out for want of time" if left else ""))
    return 1 if wrong else 0
