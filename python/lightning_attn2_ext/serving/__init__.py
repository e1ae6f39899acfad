"""What a serving engine needs beside the operators: `StatePool`, the slots that requests keep their states in."""

from .pool import MemoryReport, StatePool

__all__ = ["MemoryReport", "StatePool"]
