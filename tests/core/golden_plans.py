"""Rewrites golden_plans.txt: the problems and devices stay, their plans are the planner's of today. Reads the module
that `cmake -S . -B build/core -DLA2_BINDINGS_ONLY=ON && cmake --build build/core` makes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden_plans.txt")

sys.path.insert(0, str(ROOT / "build" / "core"))
import la2_core  # noqa: E402

lines = []
for line in GOLDEN.read_text().splitlines():
    if line and not line.startswith("#"):
        problem_text, device_text = line.split(" | ")[:2]
        problem, device = la2_core.problem(problem_text), la2_core.device(device_text)
        plan = la2_core.plan(problem, device)
        line = f"{problem_text} | {device_text} | {la2_core.describe(problem, device, plan)}"
    lines.append(line)
GOLDEN.write_text("\n".join(lines) + "\n")
