"""The planner and the CPU kernels under a fuzzer with the address and the undefined-behaviour sanitizer, some seconds;
LA2_FUZZ_SECONDS for longer, LA2_FUZZ_SEED for other inputs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = os.environ.get("LA2_FUZZ_SECONDS", "3")
SEED = os.environ.get("LA2_FUZZ_SEED", "1")
SANITIZERS = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Icsrc"]
UNDER_TEST = {
    "plan": [("csrc/core/plan.cpp", []), ("csrc/core/plan_sm90.cpp", [])],
    "kernel": [
        (
            "csrc/kernels/cpu/kernels_impl.cpp",
            ["-DLA2_CPU_TABLE=kernels_baseline", '-DLA2_CPU_NAME="baseline"', "-DLA2_VEC_BYTES=16", "-Wno-psabi"]
            + ["-fno-math-errno", "-fno-trapping-math"],
        )
    ],
}


def compiler(*arguments):
    done = subprocess.run(["g++", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def can_sanitize(folder):
    """Whether there is a g++ with both runtimes, which distributions package apart."""
    if shutil.which("g++") is None:
        return False
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = ["g++", *SANITIZERS, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder, built = tmp_path_factory.mktemp("fuzz"), {}
    if not can_sanitize(folder):
        pytest.skip("no g++ with the address and undefined-behaviour sanitizers")

    def target(name, *defines):
        key = (name, *defines)
        if key not in built:
            objects = []
            for source, flags in UNDER_TEST[name]:
                objects.append(folder / f"{Path(source).stem}.o")
                if not objects[-1].exists():
                    compiler(*SANITIZERS, "-fsanitize-coverage=trace-pc", *flags, "-c", source, "-o", objects[-1])
            built[key] = folder / "_".join((name, *(d.removeprefix("-D") for d in defines)))
            compiler(
                *SANITIZERS, "-Wall", "-Wextra", *defines, f"tests/fuzz/{name}_fuzz.cpp", *objects, "-o", built[key]
            )
        return built[key]

    return target


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60 + 2 * float(SECONDS))


@pytest.mark.parametrize("name, least_edges", (("plan", 800), ("kernel", 1500)))
def test_nothing_is_found(build, name, least_edges):
    done = run(build(name), SECONDS, SEED)
    assert done.returncode == 0, done.stderr[-6000:]
    executions, edges = map(int, re.match(r"executions (\d+), edges (\d+), inputs \d+", done.stdout).groups())
    print(done.stdout)
    assert executions > 200 and edges > least_edges, f"it saw too little to find anything: {done.stdout}"


def test_an_element_too_far_is_found(build):
    """Tensors that end one element early: seen, and the input that is printed shows it again."""
    program = build("kernel", "-DLA2_FUZZ_SHORT")
    done = run(program, SECONDS, SEED)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
    found = re.search(r"failing input: ([0-9a-f]+)", done.stderr)
    again = run(program, "--input", found[1])
    assert again.returncode != 0 and "heap-buffer-overflow" in again.stderr
    assert run(build("kernel"), "--input", found[1]).returncode == 0
