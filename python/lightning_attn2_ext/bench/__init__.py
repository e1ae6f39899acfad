"""``python -m lightning_attn2_ext bench cpu | ops | scale``: what this package takes on this machine, beside its peers.

timing.py runs a clock, floor.py measures how fast memory can be copied, wire.py counts what ranks send, peers.py knows
the other packages, gate.py decides whether a result is right (a wrong one gets no time), cpu.py, ops.py and scale.py
are the benchmarks and report.py writes what they found. Nothing here is remembered between runs: what is compared is
measured in the same one.
"""
