"""(f) The loss of the paper's Table 2 in miniature: `bench train`, its operators from one seed on one text."""

from __future__ import annotations

import dataclasses
import pathlib

from ...demo import data
from .. import peers, train
from .run import Run

LETTER, TITLE = "f", "Loss with each implementation"
_text: dict[bool, data.Corpus] = {}


def points(run: Run) -> list[dict]:
    size = train.QUICK if run.small else train.Size()
    names = [train.REFERENCE, train.OURS]
    if any(isinstance(p, peers.LightningAttn) for p in run.peers):
        names.append(train.OFFICIAL)
    return [{"op": name, "seed": 0} | dataclasses.asdict(size) for name in names]


def measure(run: Run, config: dict) -> dict:
    size = train.Size(**{f.name: config[f.name] for f in dataclasses.fields(train.Size)})
    if run.small not in _text:
        _text[run.small] = data.load(None, max_bytes=2_000_000 if run.small else None)
    row = train.train(config["op"], size, _text[run.small].train, run.dtype, run.device, config["seed"])
    return {name: row[name] for name in ("losses", "parameters", "seconds_a_step", "tokens_per_s")} | {"passed": True}


def release() -> None:
    _text.clear()


def compared(rows: list[dict]) -> list[dict]:
    """With the distance of each from the reference; nothing without the reference. Of trainings with other settings
    those that were measured last."""
    rows = [dict(r) for r in rows if "losses" in r]
    settings = [f.name for f in dataclasses.fields(train.Size)]
    rows = [r for r in rows if all(r[name] == rows[-1][name] for name in settings)]
    rows.sort(key=lambda r: list(train.OPERATORS).index(r["op"]))
    if not any(r["op"] == train.REFERENCE for r in rows):
        return []
    train.compare(rows)
    return rows


def summary(rows: list[dict]) -> str | None:
    parts = [
        f"{r['op']} {r['losses'][-1]:.4f}" + ("" if r["op"] == train.REFERENCE else f" (at most {r['gap']:.1e} apart)")
        for r in compared(rows)
    ]
    return "; ".join(parts) if len(parts) > 1 else None


def section(rows: list[dict]) -> str:
    rows = compared(rows)
    if not rows:
        return "Without the reference there is nothing to compare with."
    r = rows[0]
    size = (
        f"{r['parameters'] / 1e6:.1f} M parameters, {r['steps']} steps of {r['rows']} x {r['length']} bytes "
        f"at a rate of {r['rate']:g}"
    )
    outside = [r["op"] for r in rows if not r["passed"]]
    verdict = (
        f"Outside of the limit of {train.LIMIT}: {', '.join(outside)}." if outside else f"Limit {train.LIMIT}: kept."
    )
    return f"{size}, from one seed, on the sources of Python's standard library.\n\n{train.table(rows)}\n\n{verdict}"


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    rows = compared(rows)
    made = train.draw(folder, rows, caption) if len(rows) > 1 else []
    return [path.rename(folder / f"f_{path.name}") for path in made]
