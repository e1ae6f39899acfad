"""The order of csrc: python -> ops -> kernels -> core, and each hazard in the one place that is made for it."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SUFFIXES = {".h", ".c", ".cpp", ".cu", ".cuh", ".in"}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in SUFFIXES)

MAY_INCLUDE = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "ops": {"core", "kernels", "ops"},
    "python": {"ops", "python"},
}
DLPACK = ("python", "ATen/dlpack.h")  # a standard's header, in C
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*")', re.DOTALL)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)


def included_layer(path: Path, name: str) -> str:
    """Folder of csrc that `#include "name"` in csrc/`path` leads to, relative to the file or to csrc."""
    beside = (CSRC / path.parent / name).resolve()
    if CSRC in beside.parents and (beside.exists() or name.startswith(".")):
        return beside.relative_to(CSRC).parts[0]
    return Path(name).parts[0] if (CSRC / name).exists() else path.parts[0]  # else written by CMake


def violations(path: Path, text: str) -> list[str]:
    """What is wrong with `text` as the content of csrc/`path`."""
    layer, found = path.parts[0], []
    without_comments = COMMENT_OR_STRING.sub(lambda m: m[1] or " ", text)
    code = COMMENT_OR_STRING.sub(" ", text)
    for bracket, name in INCLUDE.findall(without_comments):
        if bracket == '"' and (target := included_layer(path, name)) not in MAY_INCLUDE[layer]:
            found.append(f"{layer} includes {target}: {name}")
        if re.match(r"(torch|ATen|c10)/", name) and layer != "ops" and (layer, name) != DLPACK:
            found.append(f"a torch header outside ops: {name}")
        if re.match(r"cuda|cute|cutlass|cub/|mma\.h", name) and (layer == "core" or path.match("kernels/cpu/*")):
            found.append(f"a CUDA header in host code: {name}")
        if (name == "torch/torch.h" or re.match(r"(ATen|c10)/", name)) and (layer, name) != DLPACK:
            found.append(f"a torch header outside its stable ABI: {name}")
    if re.search(r"\b(asm|__asm__)\b", code) and not path.match("kernels/ptx/*"):
        found.append("asm outside kernels/ptx")
    if "<<<" in code and "launch" not in path.name:
        found.append("<<< outside a launch file")
    return found


def test_there_are_sources():
    assert {path.relative_to(CSRC).parts[0] for path in SOURCES} == set(MAY_INCLUDE)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_source(source):
    assert violations(source.relative_to(CSRC), source.read_text()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("core/plan.cpp", '#include "../kernels/params.h"'),
        ("core/plan.cpp", '#include "kernels/params.h"'),
        ("core/plan.h", "#include <cuda_runtime.h>"),
        ("kernels/cpu/dispatch.cpp", "#include <cuda_bf16.h>"),
        ("kernels/cpu/dispatch.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("kernels/simt/decode.cu", '  # include "../../ops/stable.h"'),
        ("kernels/sm80/forward.cuh", 'asm volatile("ldmatrix" : "=r"(x));'),
        ("kernels/sm80/forward.cu", "kernel<<<grid, block>>>(params);"),
        ("ops/cpu_ops.cpp", "#include <ATen/ATen.h>"),
        ("ops/cpu_ops.cpp", "#include <ATen/dlpack.h>"),
        ("python/direct.cpp", "#include <ATen/ATen.h>"),
        ("python/direct.cpp", '#include "../kernels/params.h"'),
    ],
)
def test_violation_is_seen(path, text):
    assert violations(Path(path), text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/ptx/fence.cuh", 'asm volatile("fence.proxy.async;");'),
        ("kernels/sm80/forward_launch.cu", "kernel<<<grid, block>>>(params);"),
        ("kernels/sm80/forward.cu", "// asm and <<< in a comment\n/* #include <torch/csrc/stable/ops.h> */"),
        ("kernels/sm80/forward.cu", '#include "core/status.h"\nconst char* text = "a <<< b";'),
        ("ops/stable.h", "#include <torch/csrc/stable/tensor.h>"),
    ],
)
def test_allowed(path, text):
    assert violations(Path(path), text) == []
