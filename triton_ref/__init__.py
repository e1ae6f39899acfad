"""Executable specification of Lightning Attention-2: `naive` in PyTorch, `forward` and `backward` in Triton.

README.md beside this file defines the letters and the equation numbers used here. The Triton modules are imported
on demand, so `naive` works where Triton is missing.
"""
