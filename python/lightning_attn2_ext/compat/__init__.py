"""Functions of other packages, by their names and with their arguments, on this package's operators.

========================  =====================================================================================
module                    stands in for
========================  =====================================================================================
``compat.official``       ``lightning_attn.ops`` (OpenNLPLab): ``lightning_attn_func``
``compat.fla``            ``fla.ops.{simple_gla, lightning_attn, retention}`` (flash-linear-attention)
``compat.vllm``           ``vllm.model_executor.layers.lightning_attn``
``compat.sglang``         sglang's ``seg_la``: ``seg_la_fwd``, ``SegLaMeta``
========================  =====================================================================================

None of them imports the package that it stands in for. What differs is written in each module; what is not supported is
refused by the name of the argument. Tensors that the originals demand to be contiguous need not be.
"""

from importlib import import_module as _import_module

__all__ = ["fla", "official", "sglang", "vllm"]


def __getattr__(name: str):
    if name in __all__:
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
