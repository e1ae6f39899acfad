"""Loads the op libraries that lie beside this file; torch.ops.la2 exists from then on.

They hold no CPython ABI and use torch through C shims alone, so one build serves every Python and every
torch from 2.10 on.
"""

from __future__ import annotations

import re
import warnings
from importlib import metadata
from pathlib import Path

import torch

MIN_TORCH = (2, 10)
DISTRIBUTION = "lightning-attn2-ext"  # as in pyproject.toml, which states the version
FOLDER = Path(__file__).resolve().parent


def _installed_version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # imported from a source tree that was built, but not installed
        return "0+unknown"


def _check_torch() -> None:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < MIN_TORCH:
        raise ImportError(
            f"lightning_attn2_ext needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or later, "
            f"found torch {torch.__version__} in {Path(torch.__file__).parent}"
        )


def _load_cpu(folder: Path) -> None:
    library = folder / "liblightning_attn2.so"
    if not library.is_file():
        raise ImportError(f"lightning_attn2_ext: {library} is missing: install the package (pip install .) to build it")
    torch.ops.load_library(str(library))


def _load_cuda(folder: Path) -> str:
    """Returns "loaded" or why not. A failure is no error: the CPU operators work all the same."""
    library = folder / "liblightning_attn2_cuda.so"
    if torch.version.cuda is None:
        return "not loaded: this torch is built without CUDA"
    if not library.is_file():
        return "not loaded: this package was built without CUDA kernels"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = error.__cause__ or error  # the cause is what the dynamic linker said
        warnings.warn(f"lightning_attn2_ext: the CUDA kernels could not be loaded: {reason}", stacklevel=2)
        return f"not loaded: {reason}"
    return "loaded"


_check_torch()
_load_cpu(FOLDER)
version = _installed_version()
cuda_status = _load_cuda(FOLDER)
