"""setup.py as the build backend: what it asks for, what it puts into a source archive."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("setuptools", minversion="77", reason="the backend needs setuptools 77")
ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent


@pytest.fixture
def backend(monkeypatch):
    for variable in ("LA2_TORCH_DIR", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("la2_build_backend", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # were it not guarded, this would be a build
    return module


def fake_torch(folder: Path, major: int, minor: int) -> Path:
    """As much of a torch package as a build looks for."""
    (folder / "include/torch/headeronly").mkdir(parents=True)
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    (folder / "lib").mkdir()
    (folder / "lib/libtorch_cpu.so").touch()
    (folder / "include/torch/csrc/stable/library.h").touch()
    version = f"#define TORCH_VERSION_MAJOR {major}\n\n#define TORCH_VERSION_MINOR {minor}\n"
    (folder / "include/torch/headeronly/version.h").write_text(version)
    return folder


def hide_torch(backend, monkeypatch, *visible: Path):
    """The building process sees no torch; the interpreters that it asks see those given."""
    monkeypatch.setattr(backend, "_torch_dirs", lambda: map(str, visible))


def test_torch_of_this_environment_is_found(backend):
    assert backend.find_torch() == TORCH
    major, minor = torch.__version__.split(".")[:2]
    assert backend.torch_version(TORCH) == (int(major), int(minor))


def test_torch_is_found_from_an_isolated_build(backend, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    assert backend.find_torch() == TORCH


def test_requires_no_torch_where_there_is_one(backend):
    for requires in (backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()):
        assert not [name for name in requires if name.startswith("torch")]


def test_requires_what_is_missing(backend, monkeypatch, tmp_path):
    hide_torch(backend, monkeypatch, fake_torch(tmp_path / "old", 2, 9))
    monkeypatch.setattr(backend, "find_tool", lambda name, minimum=(0, 0): None)
    assert backend.get_requires_for_build_wheel() == ["torch>=2.10", "cmake>=3.25", "ninja"]
    assert backend.get_requires_for_build_sdist() == []


def test_old_torch_does_not_hide_a_newer_one(backend, monkeypatch, tmp_path):
    new = fake_torch(tmp_path / "new", 2, 10)
    hide_torch(backend, monkeypatch, fake_torch(tmp_path / "old", 2, 9), tmp_path / "none", new)
    assert backend.find_torch() == new


def test_chosen_torch_comes_first_and_must_do(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("LA2_TORCH_DIR", str(fake_torch(tmp_path / "new", 3, 0)))
    assert backend.find_torch() == tmp_path / "new"
    monkeypatch.setenv("LA2_TORCH_DIR", str(fake_torch(tmp_path / "old", 2, 9)))
    with pytest.raises(SystemExit, match=r"LA2_TORCH_DIR=.*old is no torch 2\.10 or later"):
        backend.find_torch()


def test_jobs_fit_cores_and_memory(backend, monkeypatch):
    monkeypatch.setattr(backend, "_container_limit", {"cpu.max": [150000, 100000], "memory.max": []}.get)
    assert backend.default_jobs() == 1
    monkeypatch.setattr(backend.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(backend, "_container_limit", {"cpu.max": [], "memory.max": [3 * backend.BYTES_PER_JOB]}.get)
    assert 1 <= backend.default_jobs() <= 3


def test_source_archive_is_complete(backend, tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", ".*_cache")
    names = [*backend.SourceArchive.FOLDERS, *backend.SourceArchive.FILES, "pyproject.toml", "setup.py"]
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    wanted = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    (tree / "python/lightning_attn2_ext/liblightning_attn2.so").touch()  # as an editable install leaves it

    build = "import setup, sys; print(setup.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    assert wanted - packed == set()
    generated = {name for name in packed - wanted if ".egg-info/" not in name}
    assert generated == {"PKG-INFO", "setup.cfg"}
    assert {"csrc/hide_all.map", "tests/packaging/test_backend.py", "triton_ref/__init__.py"} <= packed
