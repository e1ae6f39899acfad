"""Builds the package, in two roles.

As a script (setuptools runs it as ``__main__``) it has CMake build the op libraries and setuptools pack
them. They hold no CPython ABI, so the wheel is tagged ``py3-none-<platform>``. (One module, which is not
needed, is of CPython's stable ABI, for 3.10 and later.)

As the module ``setup`` it is the PEP 517 backend named in pyproject.toml: setuptools' own, except that it
asks for build requirements by what the machine lacks. Naming a bare ``torch`` there would have every
isolated build download the newest CUDA torch for some header files and one library to link with, while
any torch from 2.10 on serves, above all the one that is installed already.

Environment:
    LA2_CUDA        AUTO (default: build the CUDA library if there is an nvcc), ON or OFF
    LA2_CUDA_ARCHS  targets of the portable CUDA kernels, e.g. "80-real;90-real;90-virtual"
    LA2_TORCH_DIR   folder of the torch package to build against
    LA2_CMAKE_ARGS  further arguments for CMake's configure step
    MAX_JOBS        parallel compiler processes (default: by cores and memory)
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
PACKAGE = "lightning_attn2_ext"
MIN_TORCH = (2, 10)
MIN_CMAKE = (3, 25)
BYTES_PER_JOB = 2 << 30  # what one compiler process may need: nvcc on a large kernel comes close to it

# ---- What the machine has --------------------------------------------------------------------------

_PRINT_TORCH_DIR = """
import importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps(list(spec.submodule_search_locations or []) if spec else []))
"""


def torch_version(folder: Path) -> tuple[int, int] | None:
    """Version of the torch package in ``folder``, or None if nothing can be built against it."""
    header = folder / "include/torch/headeronly/version.h"
    stable = folder / "include/torch/csrc/stable/library.h"
    if not (header.is_file() and stable.is_file() and (folder / "lib/libtorch_cpu.so").is_file()):
        return None
    numbers = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR)\s+(\d+)", header.read_text()))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def _torch_dirs():
    """Where a torch may be, best first. Never imports torch."""
    spec = importlib.util.find_spec("torch")
    if spec:
        yield from spec.submodule_search_locations or []
    # pip isolates a build through PYTHONPATH: the same interpreter without it sees the target environment.
    # Other front ends build in an environment of their own: then the active one is the best guess.
    interpreters = [(sys.executable, "-I"), (sys.executable, "-E")]  # -E: with the user's site-packages
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            interpreters.append((f"{os.environ[variable]}/bin/python", "-E"))
    interpreters += [(found, "-E") for found in (shutil.which("python"), shutil.which("python3")) if found]
    for interpreter, flag in interpreters:
        command = [interpreter, flag, "-c", _PRINT_TORCH_DIR]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
            yield from json.loads(answer.stdout or "[]")
        except (OSError, ValueError, subprocess.SubprocessError):
            continue


def find_torch() -> Path | None:
    """Folder of the torch package to build against."""
    chosen = os.environ.get("LA2_TORCH_DIR")
    if chosen:
        if (torch_version(Path(chosen)) or (0, 0)) < MIN_TORCH:
            raise SystemExit(f"{PACKAGE}: LA2_TORCH_DIR={chosen} is no torch {_dotted(MIN_TORCH)} or later")
        return Path(chosen).resolve()
    for folder in map(Path, _torch_dirs()):
        if (torch_version(folder) or (0, 0)) >= MIN_TORCH:
            return folder
    return None


def find_tool(name: str, minimum: tuple[int, int] = (0, 0)) -> str | None:
    """A tool that runs and is new enough: on PATH, or beside the interpreter."""
    for path in (None, str(Path(sys.executable).parent)):
        tool = shutil.which(name, path=path)
        if not tool:
            continue
        try:
            answer = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            continue
        version = re.search(r"(\d+)\.(\d+)", answer.stdout)
        if answer.returncode == 0 and version and (int(version[1]), int(version[2])) >= minimum:
            return tool
    return None


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable, "/nonexistent"), "bin/nvcc")
        if os.access(nvcc, os.X_OK):
            return str(nvcc)
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _container_limit(name: str) -> list[float]:
    """Numbers of a cgroup file; none where there is no such limit."""
    try:
        return [float(field) for field in Path("/sys/fs/cgroup", name).read_text().split()]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def default_jobs() -> int:
    """Compiler processes that fit the cores and the memory that this process may use."""
    cores = [len(os.sched_getaffinity(0))]
    if limit := _container_limit("cpu.max"):
        cores.append(limit[0] / limit[1])
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    memory = [int(available[1]) * 1024, *_container_limit("memory.max")]
    return max(1, int(min(*cores, min(memory) / BYTES_PER_JOB)))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


# ---- PEP 517 backend -------------------------------------------------------------------------------

build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    requires = []
    if find_torch() is None:
        requires.append(f"torch>={_dotted(MIN_TORCH)}")
    if find_tool("cmake", MIN_CMAKE) is None:
        requires.append(f"cmake>={_dotted(MIN_CMAKE)}")
    if find_tool("ninja") is None:
        requires.append("ninja")
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel


# ---- setuptools commands ---------------------------------------------------------------------------


class BuildLibraries(build_ext):
    """CMake builds the op libraries and installs them beside the Python files."""

    def run(self):
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                f"{PACKAGE}: no torch {_dotted(MIN_TORCH)} or later to build against: "
                "pip install torch, or set LA2_TORCH_DIR to the folder of its package"
            )
        cmake = find_tool("cmake", MIN_CMAKE)
        if cmake is None:
            raise SystemExit(f"{PACKAGE}: no CMake {_dotted(MIN_CMAKE)} or later: pip install cmake")
        ninja, nvcc = find_tool("ninja"), find_nvcc()
        cuda = os.environ.get("LA2_CUDA", "AUTO").upper()
        jobs = os.environ.get("MAX_JOBS") or str(default_jobs())
        kind = "Debug" if self.debug else "Release"

        # One folder per generator, which CMake cannot change, and kept, so that the next build is short.
        build = ROOT / "build" / f"{kind.lower()}-{'ninja' if ninja else 'make'}"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DLA2_TORCH_DIR={torch}", f"-DLA2_CUDA={cuda}"]
        configure += [f"-DCMAKE_BUILD_TYPE={kind}", f"-DPython_EXECUTABLE={sys.executable}"]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if nvcc and cuda != "OFF":
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if os.environ.get("LA2_CUDA_ARCHS"):
            configure.append("-DLA2_CUDA_ARCHS=" + ";".join(re.split(r"[;,\s]+", os.environ["LA2_CUDA_ARCHS"].strip())))
        configure += shlex.split(os.environ.get("LA2_CMAKE_ARGS", ""))

        print(f"{PACKAGE}: torch {_dotted(torch_version(torch))} in {torch}, nvcc {nvcc}, {jobs} jobs", flush=True)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        install = [cmake, "--install", str(build), "--prefix", str(self._destination())]
        subprocess.run(install if self.debug else [*install, "--strip"], check=True)

    def _destination(self) -> Path:
        in_tree = self.inplace or self.editable_mode
        return (ROOT / "python" if in_tree else Path(self.build_lib).resolve()) / PACKAGE

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib, PACKAGE)
        return [str(folder / library.name) for library in self._destination().glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:  # for editable installs in strict mode
        if not (self.inplace or self.editable_mode):
            return {}
        return {str(Path(self.build_lib, PACKAGE, so.name)): str(so) for so in self._destination().glob("*.so")}


class BuildPython(build_py):
    """Starts from an empty folder: what an earlier build left there is not part of this package."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class SourceArchive(sdist):
    """Everything that is needed to build, test and read the project, not only the Python files."""

    FOLDERS = (".ci", "csrc", "python", "tests", "triton_ref")
    FILES = (".clang-format", ".gitignore", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "README.md")
    GENERATED = re.compile(r"\.(so|pyc|o)$|/__pycache__/|\.egg-info/|/\.[^/]+_cache/")

    def make_release_tree(self, base_dir, files):
        files = {*files, *filter(os.path.isfile, self.FILES)}
        for folder in self.FOLDERS:
            found = (path.as_posix() for path in Path(folder).rglob("*") if path.is_file())
            files.update(path for path in found if not self.GENERATED.search(path))
        super().make_release_tree(base_dir, sorted(files))


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"{PACKAGE}.libraries", sources=[])],
        cmdclass={"bdist_wheel": Wheel, "build_ext": BuildLibraries, "build_py": BuildPython, "sdist": SourceArchive},
    )
