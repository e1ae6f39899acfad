"""Lightning Attention-2 for PyTorch: exact causal linear attention with a per-head decay.

Importing this package defines the operators ``torch.ops.la2.*`` and no more. The functions and submodules
below are imported on first use, which keeps the import short.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from . import _autocast, _load, _ops, _pool_ops, _vmap  # noqa: F401 - _load defines operators, the others add to them

if TYPE_CHECKING:
    from .functional import commit, extend, lightning_attention, lightning_attention_decode, verify

__version__ = _load.version
cuda_status = _load.cuda_status  # "loaded", or why the CUDA kernels are not

__all__ = [
    "__version__",
    "commit",
    "cuda_status",
    "extend",
    "lightning_attention",
    "lightning_attention_decode",
    "verify",
]

_FUNCTIONS = dict.fromkeys(
    ("commit", "extend", "lightning_attention", "lightning_attention_decode", "verify"), "functional"
)  # name -> its module
_MODULES = ("compat", "distributed", "functional", "integrations", "nn", "serving", "slopes", "testing")


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
