"""Tables for people and JSON for programs, both with what is needed to read the numbers again later."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import time

import torch


def table(header: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """Markdown, its columns aligned: the first ``texts`` columns to the left, numbers to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row):
        aligned = [row[i].ljust(w) if i < texts else row[i].rjust(w) for i, w in enumerate(widths)]
        return "| " + " | ".join(aligned) + " |"

    rules = ["-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), "|" + "|".join(rules) + "|", *map(line, rows)])


def cpu_model() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree that this package is run from, with "+" when it has changes; None elsewhere.
    LA2_COMMIT, where the tree came without its history, is taken at its word."""
    if given := os.environ.get("LA2_COMMIT"):
        return given
    folder = pathlib.Path(__file__).resolve().parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", __file__):
            return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def environment() -> dict:
    from .. import info

    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "package": info.version(),
        "commit": commit(),
        "build": info.build_info(),
        "cpu_kernels": info.cpu_kernels(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["gpu"] = properties.name
        facts["gpu_sms"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda
    return facts


def describe(facts: dict) -> str:
    """The environment in two lines."""
    where = f"lightning_attn2_ext {facts['package']}" + (f" ({facts['commit']})" if facts["commit"] else "")
    machine = f"{facts['cpu']}, {facts['threads']} of {facts['cpus']} CPUs, load {facts['load_average_1min']}"
    if "gpu" in facts:
        machine = f"{facts['gpu']} ({facts['gpu_sms']} SMs, CUDA {facts['cuda']}); " + machine
    return f"{where}, torch {facts['torch']}, Python {facts['python']}\n{machine}"


def write_json(path: str, benchmark: str, facts: dict, results: list[dict], *, says_so: bool = True) -> None:
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": benchmark, "environment": facts, "results": results}, indent=1)
    target.write_text(text + "\n")
    if says_so:
        print(f"wrote {target}")
