"""A decode step past torch's dispatcher, where nothing of it is wanted (csrc/python/direct.cpp).

`decode` gives the result, or None for whatever is not the plain case: then the operator is to be called, which does
everything or says what is wrong. The plain case is a call on tensors of torch's own class that no one looks on at: no
dispatch or function mode, no functorch transform, autocast, tracing or gradients, no profiler of this thread. (An
observer of execution traces, or a profiler of all threads that runs in another one, is not noticed.) LA2_DIRECT=0 in
the environment, when this is imported, has every call go by the operator.
"""

from __future__ import annotations

import ctypes
import os

import torch

from . import _load


def _guards() -> tuple:
    c = torch._C
    return (
        c._len_torch_dispatch_stack,
        c._len_torch_function_stack,
        c._functorch.maybe_current_level,
        c._is_any_autocast_enabled,
        c._get_tracing_state,
        c._autograd._profiler_enabled,
    )


def _functions(library: str, device: str) -> tuple[int, int]:
    """Addresses in an op library that is loaded (csrc/ops/direct.h)."""
    handle = ctypes.CDLL(str(_load.FOLDER / library))
    names = (f"la2_decode_is_plain_{device}", f"la2_decode_direct_{device}")
    return tuple(ctypes.cast(getattr(handle, name), ctypes.c_void_p).value for name in names)


def _set_up():
    """The function and "available", or None and why this torch or this build has no such way."""
    if os.environ.get("LA2_DIRECT") == "0":
        return None, "switched off by LA2_DIRECT=0"
    try:
        from . import _direct_calls

        has_cuda = _load.cuda_status == "loaded"
        _direct_calls.setup(
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            _guards(),
            torch.is_inference_mode_enabled,
            torch.is_grad_enabled,
            torch.Tensor.is_inference,
            torch.Tensor.is_neg,
            getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version),  # below and above it
            torch.empty_like,
            {"memory_format": torch.contiguous_format},
            _functions("liblightning_attn2.so", "cpu"),
            _functions("liblightning_attn2_cuda.so", "cuda") if has_cuda else (0, 0),
        )
    except (ImportError, AttributeError, OSError) as error:
        return None, f"not available: {error}"
    return _direct_calls.decode, "available"


decode, status = _set_up()
