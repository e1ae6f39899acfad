"""What the op libraries promise as binaries: they need libtorch's C shims and the C and C++ runtimes, nothing
else, and they export their C interface only. That is why one build serves every Python and torch. The module for calls
past the dispatcher needs CPython's stable ABI besides, and no torch."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import lightning_attn2_ext

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(lightning_attn2_ext.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("lib*.so"))
MODULE = PACKAGE / "_direct_calls.abi3.so"
RUNTIMES = re.compile(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")
SHIM = re.compile(r"(aoti_)?torch_\w+")

each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)


def run(tool: str, *arguments) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} (binutils) on this machine")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def undefined(library: Path) -> set[str]:
    """Symbols that must come from another library and carry no version: glibc's and GCC's all do."""
    lines = (line.split() for line in run("nm", "-D", "--undefined-only", library).splitlines())
    return {name for kind, name in lines if kind == "U" and "@" not in name}


def dynamic_section(library: Path) -> list[tuple[str, str]]:
    return re.findall(r"\((\w+)\)\s+(.*)", run("readelf", "-d", "-W", library))


def test_libraries_are_where_the_package_is():
    names = {path.name for path in PACKAGE.glob("*.so")}
    assert "liblightning_attn2.so" in names
    assert names <= {"liblightning_attn2.so", "liblightning_attn2_cuda.so", MODULE.name}


@each_library
def test_uses_torch_through_c_shims_alone(library):
    symbols = undefined(library)
    assert "torch_library_impl" in symbols or "aoti_torch_library_init_impl" in symbols
    assert {name for name in symbols if not SHIM.fullmatch(name)} == set()


@each_library
def test_exports_the_c_interface_alone(library):
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    exported = {line.split()[-1].split("@")[0] for line in lines}
    assert {name for name in exported if not re.fullmatch(r"la2_\w+", name)} == set()
    if library.name == "liblightning_attn2.so":
        assert exported >= {"la2_build_info", "la2_cpu_kernels"}


@each_library
def test_needs_torch_and_the_runtimes_alone(library):
    section = dynamic_section(library)
    needed = {value[value.index("[") + 1 : -1] for tag, value in section if tag == "NEEDED"}
    torch_libraries = {"libtorch_cpu.so"} | ({"libtorch_cuda.so"} if "cuda" in library.name else set())
    assert needed >= torch_libraries
    # above all no libcudart, libcuda or libpython
    assert {name for name in needed - torch_libraries if not RUNTIMES.fullmatch(name)} == set()
    assert [value for tag, value in section if tag in ("RPATH", "RUNPATH")] == []


@pytest.mark.skipif(not MODULE.is_file(), reason="built without Python's headers")
def test_the_module_needs_python_alone():
    """What is not in the stable ABI of CPython 3.10 is not even declared where it is compiled (Py_LIMITED_API)."""
    assert {name for name in undefined(MODULE) if not re.fullmatch(r"_?Py\w+", name)} == set()
    lines = run("nm", "-D", "--defined-only", MODULE).splitlines()
    assert [line.split()[-1] for line in lines] == ["PyInit__direct_calls"]
    needed = {value[value.index("[") + 1 : -1] for tag, value in dynamic_section(MODULE) if tag == "NEEDED"}
    assert {name for name in needed if not RUNTIMES.fullmatch(name)} == set()


@pytest.mark.skipif(
    not MODULE.is_file()
    or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    or os.environ.get("LA2_DIRECT") == "0",
    reason="not built, switched off, or a torch without DLPack's exchange API",
)
def test_the_module_is_used():
    """What it asks torch are private functions: a torch that has lost one is noticed here."""
    from lightning_attn2_ext import _direct

    assert _direct.status == "available"


@each_library
def test_names_no_folder_of_the_build_machine(library):
    content = library.read_bytes()
    for folder in (ROOT / "csrc", Path(torch.__file__).parent / "include"):
        assert os.fsencode(folder) not in content
