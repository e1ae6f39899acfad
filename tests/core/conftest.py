"""Builds the pybind11 module over csrc/core once for a session: CMake, a C++ compiler and pybind11, no torch."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def core(tmp_path_factory):
    build = tmp_path_factory.mktemp("la2_core")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path}
    commands = [
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DLA2_BINDINGS_ONLY=ON", "-DCMAKE_BUILD_TYPE=Debug"]
        + [f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", build],
    ]
    for command in commands:
        done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    library = build / f"la2_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("la2_core", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
