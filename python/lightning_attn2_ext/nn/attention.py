"""`LightningAttention`: the token mixers of the published models as one module."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import slopes
from ..functional import lightning_attention, lightning_attention_decode
from .padded import forward_padded
from .parts import GroupRMSNorm, Lrpe, Rotary
from .presets import PRESETS, Preset
from .state import LayerState

__all__ = ["LightningAttention"]

_GATES = {"linear": lambda x: x, "sigmoid": torch.sigmoid, "silu": F.silu}


class LightningAttention(nn.Module):
    """A token mixer over `torch.ops.la2.*`: projection, activation, rotary embedding, operator, norm, gate, projection.

    Args:
        hidden_size: width of the input and of the output.
        num_heads: heads, H.
        layer_idx, num_layers: the place in the model, counted from 0: the decay of most families depends on it.
        preset: a name in `PRESETS` ("transnormer", "minimax", "ring_linear", "retnet") or a `Preset`.
        head_dim: D, a multiple of 8 up to 256 (128 with "lrpe", which doubles it); hidden_size / num_heads by default.
        device, dtype: of the parameters.
        **overrides: fields of the `Preset` to replace, e.g. ``slope="bailing_serving"`` or ``norm_groups=8``.

    The slopes are no buffer: they stay float32 whatever dtype the module is converted to, are recomputed from the
    formula rather than loaded, and follow the parameters from device to device.

    Raises:
        ValueError: on an unknown preset or field, or sizes that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        layer_idx: int = 0,
        num_layers: int = 1,
        *,
        preset: str | Preset = "minimax",
        head_dim: int | None = None,
        device=None,
        dtype=None,
        **overrides,
    ):
        super().__init__()
        self.preset = preset = _resolve(preset, overrides)
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"LightningAttention: hidden_size is {hidden_size}, expected a multiple of num_heads, {num_heads} "
                "(or give head_dim)"
            )
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.value_dim = self.head_dim * preset.value_expand
        self.scale = self.head_dim**-0.5 if preset.scale == "rsqrt" else 1.0
        where = {"device": device, "dtype": dtype}
        keys, values = num_heads * self.head_dim, num_heads * self.value_dim
        names = preset.names

        def linear(part: str, wide_in: int, wide_out: int) -> None:
            self.add_module(names[part], nn.Linear(wide_in, wide_out, bias=preset.bias, **where))

        if preset.projections == "separate":
            for part, wide in (("q", keys), ("k", keys), ("v", values)):
                linear(part, hidden_size, wide)
        else:
            linear("qkv", hidden_size, 2 * keys + values + (values if preset.projections == "with_gate" else 0))
        if preset.gate != "none" and preset.projections != "with_gate":
            linear("gate", hidden_size, values)
        linear("out", values, hidden_size)
        groups = preset.norm_groups or num_heads
        self.add_module(names["norm"], GroupRMSNorm(values, groups, preset.norm_eps, preset.norm_affine, **where))
        if preset.qk_norm:
            for part in ("q_norm", "k_norm"):
                self.add_module(names[part], GroupRMSNorm(self.head_dim, 1, preset.norm_eps, **where))
        self._rotary = None
        if preset.rotary != "none" and (layer_idx == 0 or preset.rotary_layers == "all"):
            self._rotary = names.get("rotary", "rotary")
            self.add_module(self._rotary, self._make_rotary(where))
        self.key_dim = 2 * self.head_dim if self._rotary and preset.rotary == "lrpe" else self.head_dim
        for name, dim in (("head_dim", self.key_dim), ("head_dim * value_expand", self.value_dim)):
            if dim % 8 or not 8 <= dim <= 256:
                raise ValueError(f"LightningAttention: {name} is {dim}, expected a multiple of 8 up to 256")
        self.slope = slopes.slopes(preset.slope, num_heads, layer_idx, num_layers)
        self._place_slope()
        self.register_load_state_dict_pre_hook(_drop_recomputed)

    def _make_rotary(self, where: dict) -> nn.Module:
        preset = self.preset
        if preset.rotary == "lrpe":
            return Lrpe(self.num_heads, self.head_dim, preset.rotary_base, **where)
        return Rotary(int(self.head_dim * preset.rotary_fraction), preset.rotary_base, preset.rotary == "interleaved")

    def _place_slope(self) -> None:
        device = self._part("out").weight.device
        if device.type != "meta":
            self.slope = self.slope.to(device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place_slope()
        return self

    def _part(self, part: str) -> nn.Module:
        return getattr(self, self.preset.names[part])

    def new_state(self, batch: int, *, device=None) -> LayerState:
        """An empty `LayerState` for ``batch`` sequences, on the device of the parameters."""
        weight = self._part("out").weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return LayerState.zeros(
            batch, self.num_heads, self.key_dim, self.value_dim, device=device or weight.device, dtype=dtype
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: LayerState | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence causally.

        Args:
            hidden_states: ``[B, N, hidden_size]``.
            attention_mask: ``[B, N]``, bool or numbers, nonzero for tokens and 0 for padding, which may stand on the
                left, on the right or on both sides: it neither enters nor ages a state, takes no position, and its rows
                of the result are zero. (Zeros between tokens are alike, but age the state.)
            cu_seqlens: int32 or int64 ``[num_seqs + 1]``: B is 1 and sequence i is tokens
                ``cu_seqlens[i]:cu_seqlens[i + 1]``. Excludes attention_mask.
            position_ids: ``[B, N]``, of each token in its sequence; by default counted on from ``state.length``.
            state: read and updated; of B sequences (num_seqs with cu_seqlens). None: every sequence starts empty.
                One token a row and no gradient: the decode operator is used, in place.

        Returns:
            ``[B, N, hidden_size]``.

        Raises:
            ValueError: if both attention_mask and cu_seqlens are given.
            RuntimeError: from the operator, on sizes that do not fit.
        """
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("LightningAttention: attention_mask and cu_seqlens are given, expected one of them")
        mask = None if attention_mask is None else attention_mask != 0
        q, k, v, gate, silu = self._project(hidden_states)
        if self._rotary is not None:
            if position_ids is None:
                position_ids = _positions(hidden_states, mask, cu_seqlens, None if state is None else state.length)
            rotary = getattr(self, self._rotary)
            q, k = rotary(q, position_ids), rotary(k, position_ids)
        # [B, N, H, D] storage as [B, H, N, D] views, which the operator takes as they are.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        o = self._attend(q, k, v, silu, mask, cu_seqlens, state)
        o = self._part("norm")(o.transpose(1, 2).flatten(2))
        if gate is not None:
            o = _GATES[self.preset.gate](gate) * o
        o = self._part("out")(o)
        return o if mask is None else torch.where(mask[:, :, None], o, 0)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str]:
        """q, k ``[B, N, H, D]``, v ``[B, N, H, E]``, what the gate is made of, ``[B, N, H * E]``, and the letters of
        those whose activation is left to the operator, as nothing stands between."""
        preset, h, d, e = self.preset, self.num_heads, self.head_dim, self.value_dim
        gate = None
        if preset.projections == "separate":
            q, k, v = (self._part(p)(x).unflatten(-1, (h, -1)) for p in "qkv")
        elif preset.projections == "per_head":
            q, k, v = self._part("qkv")(x).unflatten(-1, (h, 2 * d + e)).split([d, d, e], -1)
        else:
            sizes = [h * d, h * d, h * e, h * e] if preset.projections == "with_gate" else [h * d, h * d, h * e]
            q, k, v, *rest = self._part("qkv")(x).split(sizes, -1)
            q, k, v = (t.unflatten(-1, (h, -1)) for t in (q, k, v))
            gate = rest[0] if rest else None
        if preset.gate != "none" and gate is None:
            gate = self._part("gate")(x)
        now = "qk" if preset.qk_norm or self._rotary is not None else ""
        q, k, v = activate(q, k, v, "".join(p for p in preset.activated if p in now))
        silu = "".join(p for p in preset.activated if p not in now)
        if preset.qk_norm:
            # Under autocast the norm may return float32; the operator wants one dtype.
            q, k = (self._part(p)(t).to(v.dtype) for p, t in (("q_norm", q), ("k_norm", k)))
        return q, k, v, gate, silu

    def _attend(self, q, k, v, silu: str, mask, cu_seqlens, state: LayerState | None) -> Tensor:
        slope = self.slope.to(_accumulation(q))
        if state is not None:
            grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, state.state))
            if q.shape[2] == 1 and cu_seqlens is None and not grad:
                return self._decode(q, k, v, silu, mask, state, slope)
        if mask is not None:
            return self._attend_padded(*activate(q, k, v, silu), mask, state, slope)
        options = {"cu_seqlens": cu_seqlens, "scale": self.scale, "activated": silu}
        if state is None:
            return lightning_attention(q, k, v, slope, **options)
        o, final = lightning_attention(q, k, v, slope, initial_state=state.state, return_final_state=True, **options)
        added = q.shape[2] if cu_seqlens is None else cu_seqlens[1:] - cu_seqlens[:-1]
        state.store(final, state.length + added)
        return o

    def _attend_padded(self, q, k, v, mask, state: LayerState | None, slope) -> Tensor:
        if state is None:  # zero keys and values add nothing, whatever the decay
            k, v = (torch.where(mask[:, None, :, None], t, 0) for t in (k, v))
            return lightning_attention(q, k, v, slope, scale=self.scale)
        o, final = forward_padded(q, k, v, mask, state.state, slope, self.scale)
        state.store(final, state.length + mask.sum(1))
        return o

    def _decode(self, q, k, v, silu: str, mask, state: LayerState, slope) -> Tensor:
        indices = None
        added: Tensor | int = 1
        if mask is not None:
            rows = torch.arange(mask.shape[0], device=mask.device)
            indices, added = torch.where(mask[:, 0], rows, -1), mask[:, 0].to(state.length.dtype)
        rows = (t.squeeze(2) for t in (q, k, v))
        o = lightning_attention_decode(
            *rows, state.state, slope, state_indices=indices, scale=self.scale, activated=silu
        )
        state.length.add_(added)
        return o.unsqueeze(2)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, heads={self.num_heads}, head_dim={self.head_dim}, "
            f"layer={self.layer_idx} of {self.num_layers}, slope={self.preset.slope!r}"
        )


def activate(q: Tensor, k: Tensor, v: Tensor, letters: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, those that the letters name through SiLU."""
    q, k, v = (F.silu(t) if p in letters else t for p, t in (("q", q), ("k", k), ("v", v)))
    return q, k, v


def _resolve(preset: str | Preset, overrides: dict) -> Preset:
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(
                f"LightningAttention: preset is {preset!r}, expected one of {', '.join(PRESETS)}, or a Preset"
            )
        preset = PRESETS[preset]
    known = {field.name for field in dataclasses.fields(Preset)}
    for name in overrides:
        if name not in known:
            raise ValueError(f"LightningAttention: unknown argument {name!r}, expected a field of Preset")
    return dataclasses.replace(preset, **overrides)


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _positions(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, length: Tensor | None) -> Tensor:
    """``[B, N]`` int64: of every token the number of those before it in its sequence; of padding some number."""
    batch, n = x.shape[:2]
    token = torch.arange(n, device=x.device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
        start = -cu_seqlens[:-1].long() if length is None else length - cu_seqlens[:-1]
        return (token + start[sequence])[None]
    within = token.expand(batch, n) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    return within if length is None else within + length[:, None]


def _drop_recomputed(module: LightningAttention, state_dict: dict, prefix: str, *_) -> None:
    for name in module.preset.dropped:
        state_dict.pop(prefix + name, None)
