"""Runs what only a GPU can show and writes down the outcome, with what is needed to repeat it.

    python tests/record.py [--out tests/results] [--suite] [--sanitizer] [--abuse] [--bench] [--jobs N]

--suite: the tests marked gpu. --sanitizer: compute-sanitizer's four tools over those marked sanitize. --abuse: the
tests in tests/abuse marked gpu, with LA2_EXAMPLES (5000) examples of each property, which are counted. --bench: `python
-m lightning_attn2_ext bench`. None of the four: suite and sanitizer. Start it from the repository's root, with the
package installed or PYTHONPATH pointing at it. Writes <out>/<name of the GPU>.json and .md (--abuse alone: <name of the
GPU>_abuse, beside what is there of the others); the exit status is 0 only if everything ran and nothing failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Folders with tests marked gpu, and the files with those marked sanitize: the rest needs not even be importable here.
SUITE = ("tests/ops", "tests/triton_ref")
SANITIZED = ("tests/ops/test_cuda_tiny.py", "tests/ops/test_extend_cuda.py")
ABUSE = "tests/abuse"


# ---- parsing: what each program says, without trusting its exit status


def count_tests(junit: str) -> dict:
    """Counts of a --junitxml report. A test that failed and then broke in teardown stands there twice and is one."""
    outcomes: dict[str, set] = {}
    for case in xml.etree.ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        outcomes.setdefault(name, set()).update(child.tag for child in case)
    counts = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for name, tags in outcomes.items():
        kind = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        counts[kind] += 1
        if kind == "failed":
            counts["failures"].append(name)
    return counts


def count_sanitizer(tool: str, text: str) -> dict | None:
    """Sums over all processes that reported: {"errors": .., "warnings": ..}; None: the tool never summed up."""
    if tool == "racecheck":
        found = re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
        counted = [(int(errors), int(warnings)) for _, errors, warnings in found]
    else:
        counted = [(int(errors), 0) for errors in re.findall(r"ERROR SUMMARY: (\d+) errors?", text)]
    if not counted:
        return None
    return {"errors": sum(e for e, _ in counted), "warnings": sum(w for _, w in counted)}


def count_pytest_line(text: str) -> dict:
    """Counts of pytest's last line, such as "3 passed, 1 skipped in 2.31s"."""
    lines = [
        line for line in text.splitlines() if re.search(r"\b(passed|failed|skipped|errors?|ran)\b.* in [\d.]+s", line)
    ]
    last = lines[-1] if lines else ""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last):
        counts["failed" if kind.startswith("error") else kind] += int(number)
    return counts


# ---- running


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list[str], **environment: str) -> tuple[int, str, float]:
    """(exit status, output, seconds); the output is also printed line by line as it comes."""
    say("$ " + " ".join([*(f"{k}={v}" for k, v in environment.items()), *command]))
    begin = time.perf_counter()
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            lines.append(line)
            print("  " + line, end="", flush=True)
    return process.returncode, "".join(lines), time.perf_counter() - begin


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments]


def run_suite(paths: Sequence[str], jobs: int = 1, **more: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # The references run on the CPU: with a pool of threads for each worker they would stand in each other's way.
        environment = more | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
        workers = ["-n", str(jobs)] if jobs > 1 else []
        status, _, seconds = run(pytest_command(*options, *workers, *paths), **environment)
        counts = count_tests(report.read_text()) if report.exists() else count_tests("<none/>")
    return judge_suite(status, counts) | {"seconds": round(seconds, 1)}


def judge_suite(status: int, counts: dict) -> dict:
    """Good is: the runner says so, some test passed, and none failed."""
    is_good = status == 0 and counts["passed"] > 0 and counts["failed"] == 0
    return {"ok": is_good, "exit_status": status} | counts


def count_examples(log: str) -> dict[str, int]:
    """Sums by property of the lines that tests/support/abuse.py wrote, those on the GPU."""
    counts: dict[str, int] = {}
    for line in log.splitlines():
        entry = json.loads(line)
        if entry["device"] == "cuda":
            counts[entry["test"]] = counts.get(entry["test"], 0) + entry["examples"]
    return dict(sorted(counts.items()))


def run_abuse(jobs: int, wanted: int) -> dict:
    """Good is what is good of a suite, and at least as many examples of every property as were wanted."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "examples.jsonl"
        log.touch()
        # What holds memory or counts it cannot share the GPU: one process, after the others.
        alone = [f"{ABUSE}/{name}" for name in ("test_growth.py", "test_out_of_memory.py")]
        together = sorted({str(p.relative_to(ROOT)) for p in (ROOT / ABUSE).glob("test_*.py")} - set(alone))
        given = {"LA2_EXAMPLES": str(wanted), "LA2_EXAMPLES_LOG": str(log)}
        parts = [run_suite(together, jobs, **given), run_suite(alone, 1, **given)]
        examples = count_examples(log.read_text())
    return judge_abuse(parts, examples, wanted)


def judge_abuse(parts: list[dict], examples: dict[str, int], wanted: int) -> dict:
    total: dict = {name: sum(part[name] for part in parts) for name in ("passed", "failed", "skipped", "seconds")}
    total["failures"] = [name for part in parts for name in part["failures"]]
    enough = bool(examples) and all(count >= wanted for count in examples.values())
    total |= {"examples": examples, "examples_wanted": wanted}
    statuses = [part["exit_status"] for part in parts]
    return {"ok": enough and all(part["ok"] for part in parts), "exit_status": max(statuses)} | total


def run_tool(tool: str, sanitizer: str, paths: Sequence[str]) -> dict:
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "99", "--print-limit", "20"]
    if tool == "memcheck":
        options += ["--padding", "32"]  # else a neighbour's memory hides an overrun
    # initcheck does not see what the copy engine stores: to it every result of the Hopper kernels is uninitialised.
    chosen = ["-k", "not hopper"] if tool == "initcheck" else []
    # torch's caching allocator hides the ends and the age of allocations from these two.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
    command = pytest_command("-m", "sanitize", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen, *paths)
    status, text, seconds = run([sanitizer, *options, *command], **environment)
    return judge_tool(tool, status, text) | {"seconds": round(seconds, 1)}


def judge_tool(tool: str, status: int, text: str) -> dict:
    """Good is: exit status 0, a summary was printed and counts nothing, tests ran and passed."""
    summary, tests = count_sanitizer(tool, text), count_pytest_line(text)
    is_clean = summary is not None and summary["errors"] == 0 and summary["warnings"] == 0
    is_good = status == 0 and is_clean and tests["passed"] > 0 and tests["failed"] == 0
    counted = summary or {"errors": None, "warnings": None}
    return {"ok": is_good, "exit_status": status} | counted | {"tests": tests}


def joined(one: dict, two: dict) -> dict:
    """A tool's results over two files of tests as one."""
    counts = {}
    for kind in ("errors", "warnings"):
        counts[kind] = None if None in (one[kind], two[kind]) else one[kind] + two[kind]
    tests = {kind: one["tests"][kind] + two["tests"][kind] for kind in one["tests"]}
    both = {"ok": one["ok"] and two["ok"], "exit_status": max(one["exit_status"], two["exit_status"])}
    return both | counts | {"tests": tests, "seconds": max(one["seconds"], two["seconds"])}


def run_bench() -> dict:
    status, text, seconds = run([sys.executable, "-m", "lightning_attn2_ext", "bench"])
    return {"ok": status == 0, "exit_status": status, "seconds": round(seconds, 1), "output": text}


# ---- what it ran on


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit, with + behind it where the tree is not clean."""
    if given := os.environ.get("LA2_COMMIT"):
        return given
    revision = output_of("git", "rev-parse", "HEAD")
    return revision + ("+" if revision and output_of("git", "status", "--porcelain") else "") or "unknown"


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def facts() -> dict:
    """In a process of its own, so that no CUDA context stays behind while the tests run."""
    code = (
        "import json, torch, lightning_attn2_ext as package\n"
        "has = torch.cuda.is_available()\n"
        "p = torch.cuda.get_device_properties(0) if has else None\n"
        "print(json.dumps({'gpu': p.name if has else 'none',\n"
        "  'compute_capability': f'{p.major}.{p.minor}' if has else 'none', 'torch': torch.__version__,\n"
        "  'cuda': torch.version.cuda or 'none', 'package': package.__version__,\n"
        "  'cuda_library': package.cuda_status}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"record.py: torch and the package cannot be imported:\n{done.stderr}")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return json.loads(done.stdout.splitlines()[-1]) | {
        "driver": driver[0] if driver else "unknown",
        "triton": version_of("triton"),
        "python": ".".join(map(str, sys.version_info[:3])),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python " + " ".join(["tests/record.py", *sys.argv[1:]]),
    }


# ---- writing down


def markdown(record: dict) -> str:
    where = record["where"]
    lines = [f"# GPU results: {where['gpu']}", "", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in where.items()]
    lines += ["", "| run | passed | failed | skipped | errors | seconds | |", "|---|---|---|---|---|---|---|"]

    def row(name, result, tests, errors):
        verdict = "ok" if result["ok"] else f"FAILED (exit status {result['exit_status']})"
        counts = " | ".join(str(tests[kind]) for kind in ("passed", "failed", "skipped")) if tests else "– | – | –"
        lines.append(f"| {name} | {counts} | {errors} | {result['seconds']:.0f} | {verdict} |")

    if "suite" in record:
        row("suite", record["suite"], record["suite"], "–")
    for tool, result in record.get("sanitizer", {}).items():
        if result["errors"] is None:
            errors = "no summary"
        else:
            errors = f"{result['errors']}" + (f" + {result['warnings']} warnings" if result["warnings"] else "")
        row(tool, result, result["tests"], errors)
    if "abuse" in record:
        row("abuse", record["abuse"], record["abuse"], "–")
    if "bench" in record:
        row("bench", record["bench"], None, "–")
    if failures := [name for part in ("suite", "abuse") for name in record.get(part, {}).get("failures", [])]:
        lines += ["", "Failed:", "", *(f"- {name}" for name in failures)]
    if "abuse" in record:
        wanted = record["abuse"]["examples_wanted"]
        lines += ["", f"Examples drawn and held to the specification on the GPU, of {wanted} wanted of each:", ""]
        lines += [f"- {name}: {count}" for name, count in record["abuse"]["examples"].items()] or ["- none"]
    if "missing" in record:
        lines += ["", f"Not run: {record['missing']}."]
    if "bench" in record:
        lines += ["", "```", record["bench"]["output"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def is_good(record: dict) -> bool:
    results = [*record.get("sanitizer", {}).values(), *(record[k] for k in ("suite", "abuse", "bench") if k in record)]
    return "missing" not in record and bool(results) and all(result["ok"] for result in results)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tests/results", help="folder of the results (default: tests/results)")
    for part in ("suite", "sanitizer", "abuse", "bench"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes for the suite (pytest-xdist); above 1 the sanitizers run beside it",
    )
    parser.add_argument(
        "paths", nargs="*", help=f"for pytest (default: {' '.join(SUITE)}, sanitizer: {' '.join(SANITIZED)})"
    )
    arguments = parser.parse_args(argv)
    parts = ("suite", "sanitizer", "abuse", "bench")
    wants = {part for part in parts if getattr(arguments, part)} or {"suite", "sanitizer"}

    record: dict = {"where": facts()}
    for name, value in record["where"].items():
        say(f"{name}: {value}")
    folder = ROOT / arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (re.sub(r"[^a-z0-9]+", "_", record["where"]["gpu"].lower()).strip("_") or "none")

    if wants == {"abuse"}:
        target = target.with_name(target.name + "_abuse")

    def write():
        record["ok"] = is_good(record)
        target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        target.with_suffix(".md").write_text(markdown(record))

    tools = TOOLS if "sanitizer" in wants else ()
    sanitizer = shutil.which("compute-sanitizer")
    if tools and sanitizer is None:
        record["missing"], tools = "compute-sanitizer is not on PATH", ()
    # With --jobs the tools and the suite run side by side: the tools take the GPU in turns and need little of it. After
    # every part: a run that is cut off leaves what it has.
    most = 1 + len(TOOLS) * len(arguments.paths or SANITIZED)
    with concurrent.futures.ThreadPoolExecutor(1 if arguments.jobs == 1 else most) as pool:
        running, done_parts = {}, {}
        if "suite" in wants:
            running[pool.submit(run_suite, arguments.paths or SUITE, arguments.jobs)] = "suite"
        for tool in tools:
            for path in arguments.paths or SANITIZED:
                running[pool.submit(run_tool, tool, sanitizer, [path])] = tool
        for done in concurrent.futures.as_completed(running):
            name = running[done]
            if name == "suite":
                record[name] = done.result()
            else:
                parts = done_parts.setdefault(name, [])
                parts.append(done.result())
                if len(parts) < len(arguments.paths or SANITIZED):
                    continue
                record.setdefault("sanitizer", {})[name] = functools.reduce(joined, parts)
            write()
    if "abuse" in wants:
        record["abuse"] = run_abuse(arguments.jobs, int(os.environ.get("LA2_EXAMPLES", "5000")))
        write()
    if "bench" in wants:
        record["bench"] = run_bench()
    write()
    say("\n" + markdown(record))
    say(f"written to {target}.json and .md")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
