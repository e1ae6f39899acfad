"""``bench speed``: this operator and softmax attention over growing lengths (see compare.py)."""

from __future__ import annotations

from . import compare


def main(argv: list[str] | None = None) -> int:
    return compare.command("speed", ("time",), ["la2", "softmax"], argv)
