"""Lightning Attention-2 for PyTorch: exact causal linear attention with a per-head decay.

Importing this package defines the operators ``torch.ops.la2.*`` and no more. The functions and submodules
below are imported on first use, which keeps the import short.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from . import _load, _ops  # noqa: F401 - in this order: _load defines the operators, _ops adds their Python side

if TYPE_CHECKING:
    from .functional import lightning_attention

__version__ = _load.version
cuda_status = _load.cuda_status  # "loaded", or why the CUDA kernels are not

__all__ = ["__version__", "cuda_status", "lightning_attention"]

_FUNCTIONS = {"lightning_attention": "functional"}  # name -> its module
_MODULES = ("distributed", "functional", "slopes", "testing")


def __getattr__(name: str):
    if name in _MODULES:
        return _import_module(f".{name}", __name__)
    if name in _FUNCTIONS:
        value = getattr(_import_module(f".{_FUNCTIONS[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_FUNCTIONS, *_MODULES})
