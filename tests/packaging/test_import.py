"""Importing the package: short, honest about what it could not load, clear about a torch that is too old."""

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import lightning_attn2_ext
from lightning_attn2_ext import _load

ROOT = Path(__file__).resolve().parents[2]
MAX_IMPORT_SECONDS = 0.1

# Modules loaded already are not this package's doing, hence torch first.
IMPORT_REPORT = """
import json, sys, time
import torch
before = set(sys.modules)
begin = time.perf_counter()
import lightning_attn2_ext
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def python(code: str, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


def import_report() -> dict:
    done = python(IMPORT_REPORT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_is_short():
    # The minimum is the package's own cost; anything above it is the machine's. The first run below the
    # limit decides.
    seconds = []
    while len(seconds) < 6 and min(seconds, default=1.0) >= MAX_IMPORT_SECONDS:
        seconds.append(import_report()["seconds"])
    assert min(seconds) < MAX_IMPORT_SECONDS, seconds


def test_import_brings_in_nothing_beside_torch():
    packages = {module.split(".")[0] for module in import_report()["modules"]}
    assert packages - sys.stdlib_module_names <= {"lightning_attn2_ext", "torch"}


def test_version_is_stated_once():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert lightning_attn2_ext.__version__ == metadata.version("lightning-attn2-ext") == stated


def test_wheel_fits_every_python():
    tags = re.findall(r"^Tag: (.+)$", metadata.distribution("lightning-attn2-ext").read_text("WHEEL"), re.MULTILINE)
    assert len(tags) == 1 and re.fullmatch(r"py3-none-(linux|manylinux)\w+", tags[0])


def test_public_names_exist():
    assert set(lightning_attn2_ext.__all__) <= set(dir(lightning_attn2_ext))
    for name in lightning_attn2_ext.__all__:
        getattr(lightning_attn2_ext, name)
    for name in lightning_attn2_ext._MODULES:
        assert getattr(lightning_attn2_ext, name) is importlib.import_module(f"lightning_attn2_ext.{name}")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lightning_attn2_ext.no_such_name


def test_torch_that_is_too_old_is_named(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.9.1+cpu"\n')
    done = python("import lightning_attn2_ext", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "ImportError: lightning_attn2_ext needs torch 2.10 or later, found torch 2.9.1+cpu" in done.stderr


def test_missing_cpu_library_is_an_import_error(tmp_path):
    with pytest.raises(ImportError, match=r"liblightning_attn2\.so is missing: install the package"):
        _load._load_cpu(tmp_path)


def test_cuda_status_says_what_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _load._load_cuda(tmp_path) == "not loaded: this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _load._load_cuda(tmp_path) == "not loaded: this package was built without CUDA kernels"

    (tmp_path / "liblightning_attn2_cuda.so").write_text("no library")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status = _load._load_cuda(tmp_path)
    assert status.startswith("not loaded: ") and "liblightning_attn2_cuda.so" in status
    assert len(caught) == 1 and status.removeprefix("not loaded: ") in str(caught[0].message)
