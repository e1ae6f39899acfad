"""``bench memory``: the most memory that a call holds beyond its inputs, over growing lengths (see compare.py)."""

from __future__ import annotations

from . import compare


def main(argv: list[str] | None = None) -> int:
    return compare.command("memory", ("memory",), None, argv)
