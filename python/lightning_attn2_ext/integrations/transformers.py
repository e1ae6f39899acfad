"""transformers' MiniMax (``MiniMaxForCausalLM``) on `torch.ops.la2.*`, with the weights that it has.

``patch()`` makes every MiniMax model built from then on (``from_pretrained``, ``from_config``) use this package's
attention, through transformers' own patch mapping; ``patch(model)`` changes a model that exists already. ``unpatch``
undoes either. Parameters, buffers, state dicts and the signature of ``forward`` stay.

What is different from the code that is replaced:

- slopes are recomputed in float32 from the configuration, where a model in bfloat16 has them rounded to bfloat16, and
  the states in the cache are float32, whatever the model's dtype;
- a prompt may be continued in pieces of any size with a cache, at the speed of a prefill;
- padding, on either side, does not age a state, also where a cached prompt is continued;
- beam search moves the states along with the beams; the original's cache moves keys and values only;
- where the first layer keeps a state (as in MiniMax-Text-01), the cache knows its length; the original's says 0, from
  which tokens behind a cached prompt get the wrong positions and masks.

Tested with transformers 5.23 and 5.24; `register_patch_mapping` came with 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.minimax import modeling_minimax
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention
from transformers.monkey_patching import get_patch_mapping, register_patch_mapping, unregister_patch_mapping

from .. import slopes
from ..functional import lightning_attention
from ..nn.padded import forward_padded

__all__ = ["LightningMiniMaxAttention", "adopt_cache", "is_patched", "patch", "unpatch"]

_TARGET = MiniMaxLightningAttention.__name__
_SLOPES = ("hf_minimax", "minimax", "buffer")
_SILU = (nn.SiLU, type(ACT2FN["silu"]))  # the types; what is derived from them may be something else


@torch.compiler.assume_constant_result
def _slopes(kind: str, heads: int, layer_idx: int, layers: int, device: torch.device) -> Tensor:
    """Of a layer that is compiled before it has run, part of its graph: traced, they would be made in every call."""
    return slopes.slopes(kind, heads, layer_idx, layers).to(device)


class _Cache(MiniMaxCache):
    """The cache that the model made, whose states move with the beams, and which knows how long it is when its first
    layer keeps a state rather than keys: the positions and masks of the next tokens are made from that."""

    def _with_keys(self, layer_idx: int) -> int:
        if layer_idx < len(self.linear_cache) and isinstance(self.linear_cache[layer_idx], Tensor):
            lengths = [super(_Cache, self).get_seq_length(i) for i in range(len(self.layers))]
            return lengths.index(max(lengths)) if lengths else layer_idx
        return layer_idx

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._with_keys(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._with_keys(layer_idx))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for layer_idx, state in enumerate(self.linear_cache):
            if isinstance(state, Tensor):
                self.linear_cache[layer_idx] = state.index_select(0, beam_idx.to(state.device))


class LightningMiniMaxAttention(MiniMaxLightningAttention):
    """`MiniMaxLightningAttention` with another ``forward``: the same parameters, buffers and arguments."""

    #: Formula of the slopes, a name of ``slopes.NAMES``, or "buffer" for the module's own ``slope_rate``.
    slopes = "hf_minimax"

    def slope(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[H]``, >= 0, computed in float64 and rounded once."""
        if self.slopes == "buffer":
            return self.slope_rate.detach().flatten().to(dtype)
        known = self.__dict__.get("_la2_slope")
        if known is None or known[0] != (self.slopes, device):
            values = _slopes(self.slopes, self.num_attention_heads, self.layer_idx, self.num_hidden_layers, device)
            if torch.compiler.is_compiling():
                return values.to(dtype)
            known = (self.slopes, device), values
            self.__dict__["_la2_slope"] = known
        return known[1].to(dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: MiniMaxCache | None = None,
        past_key_values: MiniMaxCache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """As the original's: ``(output [B, N, hidden], state [B, H, D, D])``; position_embeddings are not used.

        attention_mask is ``[B, N]`` (of these tokens alone) or None. With a cache the layer's state is read from it and
        stored in it; a single token updates it in place. Its name is past_key_values up to transformers 5.23.

        Raises:
            TypeError: on a cache under any other name, without which the result would be wrong and look right.
        """
        for name, value in kwargs.items():
            if isinstance(value, Cache):
                raise TypeError(f"{type(self).__name__}: {name} is a cache, expected it as cache or past_key_values")
        cache = past_key_values if cache is None else cache
        batch, length, _ = hidden_states.shape
        heads, dim = self.num_attention_heads, self.head_dim
        qkv = self.qkv_proj(hidden_states)
        trained = (qkv, self.norm.weight, *self.output_gate.parameters())
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in trained)
        silu = "qkv" if attention_mask is None and not grad and type(self.act_fn) in _SILU else ""  # the operator's
        if not silu:
            qkv = self.act_fn(qkv)
        q, k, v = (t.transpose(1, 2) for t in qkv.view(batch, length, heads, 3 * dim).split(dim, -1))
        state = None if cache is None else _cached_state(cache, self.layer_idx)
        accumulation = torch.float64 if q.dtype == torch.float64 else torch.float32
        if state is not None:
            state = state.to(q.device, accumulation)  # float32 already, unless the original wrote it
        slope = self.slope(q.device, accumulation)
        weight, eps = self.norm.weight, self.norm.variance_epsilon
        if attention_mask is None and length == 1 and state is not None and not grad:
            # The gate is projected first, so that norm and gate start before the states are through.
            gate, rows = self.output_gate(hidden_states).squeeze(1), (t.squeeze(2) for t in (q, k, v))
            out = torch.ops.la2.decode_gated_norm(
                *rows, state, gate, weight.to(q.dtype), slope, eps=eps, silu=7 if silu else 0
            ).unsqueeze(1)
        else:
            if attention_mask is not None:
                out, state = forward_padded(q, k, v, attention_mask != 0, state, slope)
            else:
                out, state = lightning_attention(
                    q, k, v, slope, initial_state=state, return_final_state=True, activated=silu
                )
            # One kernel and one rounding, where the module's own forward takes several of each.
            out = F.rms_norm(out.transpose(1, 2).flatten(2), weight.shape, weight.to(out.dtype), eps)
            out = F.sigmoid(self.output_gate(hidden_states)) * out
        out = self.out_proj(out)
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        return out, state


def adopt_cache(cache: MiniMaxCache) -> MiniMaxCache:
    """Makes a cache move its states with the beams and know its length (above), and returns it. A patched layer does it
    to a cache that it meets; call it before a layer that is compiled by itself meets one: a compiler cannot change an
    object's class."""
    if type(cache) is MiniMaxCache:
        cache.__class__ = _Cache
    return cache


def _cached_state(cache: MiniMaxCache, layer_idx: int) -> Tensor | None:
    adopt_cache(cache)
    state = cache.linear_cache[layer_idx] if layer_idx < len(cache.linear_cache) else None
    return state if isinstance(state, Tensor) else None


def patch(model: nn.Module | None = None, *, slopes: str = "hf_minimax") -> int | None:
    """Run MiniMax models on this package's operator.

    Args:
        model: a model that holds MiniMax layers, to be changed in place. None: every one that is built from now on.
        slopes: "hf_minimax", the formula of transformers (and of what was trained with it); "minimax", that of
            MiniMax-Text-01's own code, which differs where the number of heads is no power of two; or "buffer" to
            trust each layer's ``slope_rate``, which is rounded in a bfloat16 model. With a model it counts for that
            model, else for those built from now on.

    Returns:
        With a model, the number of layers that were changed; else None.

    Raises:
        ValueError: on unknown slopes, a model without such layers, or where others have a mapping for them.
    """
    if slopes not in _SLOPES:
        raise ValueError(f"patch: slopes is {slopes!r}, expected one of {', '.join(_SLOPES)}")
    if model is None:
        taken = get_patch_mapping().get(_TARGET)
        if taken is not None and not issubclass(taken, LightningMiniMaxAttention):
            raise ValueError(f"patch: {_TARGET} is mapped to {taken.__module__}.{taken.__qualname__} already")
        register_patch_mapping({_TARGET: _variant(slopes)}, overwrite=True)
        return None
    layers = [m for m in model.modules() if isinstance(m, modeling_minimax.MiniMaxLightningAttention)]
    if not layers:
        raise ValueError(f"patch: {type(model).__name__} holds no {_TARGET}")
    for layer in layers:
        layer.__class__ = _variant(slopes)
    return len(layers)


def unpatch(model: nn.Module | None = None) -> int | None:
    """Undo `patch`: for a model, returning the number of layers that were changed back, or for those to be built.

    States that a patched model left in a cache stay float32 there, which the original reads too.
    """
    if model is None:
        taken = get_patch_mapping().get(_TARGET)
        if taken is not None and issubclass(taken, LightningMiniMaxAttention):
            unregister_patch_mapping([_TARGET])
            _restore_recorders()
        return None
    layers = [m for m in model.modules() if isinstance(m, LightningMiniMaxAttention)]
    for layer in layers:
        layer.__class__ = MiniMaxLightningAttention
        layer.__dict__.pop("_la2_slope", None)
    return len(layers)


def _restore_recorders() -> None:
    """Building a model under a mapping also changes, for the class and for good, whose outputs ``output_attentions``
    collects. The original class there stands for its subclasses too."""
    recorded = modeling_minimax.MiniMaxPreTrainedModel._can_record_outputs
    for name, of in recorded.items():
        if isinstance(of, list):
            recorded[name] = [MiniMaxLightningAttention if _is_ours(c) else c for c in of]


def _is_ours(c: object) -> bool:
    return isinstance(c, type) and issubclass(c, LightningMiniMaxAttention)


def is_patched(model: nn.Module) -> bool:
    """Whether every Lightning layer of the model runs on this package's operator."""
    layers = [m for m in model.modules() if isinstance(m, MiniMaxLightningAttention)]
    return bool(layers) and all(isinstance(m, LightningMiniMaxAttention) for m in layers)


class _MiniMaxSlopes(LightningMiniMaxAttention):
    slopes = "minimax"


class _BufferSlopes(LightningMiniMaxAttention):
    slopes = "buffer"


def _variant(kind: str) -> type[LightningMiniMaxAttention]:
    return {"hf_minimax": LightningMiniMaxAttention, "minimax": _MiniMaxSlopes, "buffer": _BufferSlopes}[kind]
