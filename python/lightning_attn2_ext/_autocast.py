"""What autocast does with the operators: q, k and v go in the autocast dtype, as into every other matrix product, and
with them the gate and the weight of a norm behind decode.

Slopes, states and offsets stay as they are, sums are float32 as ever, and gradients come back in the dtype of the
inputs. Float64 is left alone, as autocast leaves it everywhere. `la2::backward` has no rule: it gets what forward got.
"""

from __future__ import annotations

import torch

from . import _load  # noqa: F401 - defines the operators

_library = torch.library.Library("la2", "IMPL")
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _cast(x: torch.Tensor, device_type: str) -> torch.Tensor:
    if x.device.type != device_type or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def _register(op, device_type: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEYS[device_type]))

    is_cast = [argument.name in ("q", "k", "v", "gate", "weight") for argument in op._schema.arguments]

    def autocast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(_cast(x, device_type) if cast else x for x, cast in zip(args, is_cast)), **kwargs)

    _library.impl(op, autocast, _KEYS[device_type])


_FORWARD = ("forward", "forward_with_state", "forward_silu")
for _name in (*_FORWARD, "decode", "decode_gated_norm", "verify", "commit", "extend"):
    for _device_type in _KEYS:
        _register(getattr(torch.ops.la2, _name).default, _device_type)
