"""``python -m lightning_attn2_ext bench ...``: what this package takes on this machine, beside its peers.

timing.py runs a clock, floor.py measures how fast memory can be copied, peers.py knows the other packages, gate.py
decides whether a result is right (a wrong one gets no time), cpu.py and ops.py are the two benchmarks, map.py the
second one over many shapes, energy.py back to back, and report.py writes what they found. On either device:
compare.py (with speed.py and memory.py, the same race with fewer entries), decode.py and accuracy.py, over entries.py
(who takes part), machine.py (clock, meter, inputs) and plots.py; extend.py times requests against a pool of states,
layer.py transformers' MiniMax layer, train.py trains a model with each operator. scale.py times context parallelism,
with wire.py to count what ranks send; calibrate.py measures the planner's constants. Nothing here is remembered
between runs: what is compared is measured in the same one.
"""
