"""A progress bar: tqdm's when it is installed, else a line that is rewritten (or, in a log, printed now and then)."""

from __future__ import annotations

import sys
import time


class Plain:
    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.done = total, unit, 0
        self.start = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        self.text = ""

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        self.text = text

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.perf_counter()
        if self.done < self.total and now - self.shown < (0.2 if self.terminal else 10.0):
            return
        self.shown = now
        line = f"  {self.done}/{self.total} {self.unit}s, {now - self.start:.0f} s, {self.text}"
        print("\r" + line if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def bar(total: int, unit: str = "step"):
    """An object with ``update(n)``, ``set_postfix_str(text)`` and ``close()``."""
    try:
        from tqdm import tqdm
    except ImportError:
        return Plain(total, unit)
    return tqdm(total=total, unit=unit, dynamic_ncols=True, mininterval=0.2)
