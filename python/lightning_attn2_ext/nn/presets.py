"""What the published models put around the operator, as data: one :class:`Preset` for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["PRESETS", "Preset"]

_PROJECTIONS = ("per_head", "concatenated", "with_gate", "separate")
_ROTARY = ("none", "half", "interleaved", "lrpe")
_GATES = ("none", "linear", "sigmoid", "silu")
_CHOICES = {"projections": _PROJECTIONS, "rotary": _ROTARY, "gate": _GATES, "scale": ("one", "rsqrt")}


@dataclasses.dataclass(frozen=True)
class Preset:
    """One model's token mixer: ``out(gate(x) * norm(la2(rotary(qk_norm(act(q))), ..., act(v))))``.

    Attributes:
        slope: the formula, a name of ``slopes.NAMES``.
        names: what each part is called in the state dict: ``qkv`` (or ``q``, ``k``, ``v``), ``gate``, ``out``,
            ``norm``, ``q_norm``, ``k_norm``, ``rotary``. Those of the original where it has one.
        projections: ``per_head`` (one matrix, its rows ``[H, (q, k, v)]``), ``concatenated`` (one matrix, rows
            ``[(q, k, v), H]``), ``with_gate`` (the same with the gate as the fourth part) or ``separate``.
        activated: which of ``q``, ``k``, ``v`` go through SiLU.
        qk_norm: RMSNorm with a weight over each head's q and k, after the activation.
        rotary: ``half`` (pairs i and i + d/2), ``interleaved`` (pairs 2i and 2i + 1), ``lrpe`` (``cat(x cos, x sin)``
            with learned angles: the key dim doubles) or ``none``.
        rotary_fraction: share of a head's dimensions, from the first on, that are rotated.
        rotary_base: base of the geometric sequence of angles.
        rotary_layers: ``all``, or ``first`` for layer 0 alone.
        scale: factor on the scores, ``one`` or ``rsqrt`` (head dim to the power -1/2).
        norm_groups: groups that the output RMSNorm is taken over; 1 is the full width, 0 one group a head.
        norm_affine: whether that norm has a weight.
        norm_eps: epsilon of every RMSNorm here.
        gate: what the gate projection goes through before it multiplies the normalised output.
        value_expand: value dim over key dim.
        bias: of all projections.
        dropped: buffers of the original's state dict that are recomputed here; loading ignores them.
    """

    slope: str
    names: Mapping[str, str]
    projections: str = "concatenated"
    activated: str = "qk"
    qk_norm: bool = False
    rotary: str = "none"
    rotary_fraction: float = 1.0
    rotary_base: float = 10000.0
    rotary_layers: str = "all"
    scale: str = "one"
    norm_groups: int = 1
    norm_affine: bool = True
    norm_eps: float = 1e-6
    gate: str = "sigmoid"
    value_expand: int = 1
    bias: bool = False
    dropped: tuple[str, ...] = ()

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"Preset: {field} is {getattr(self, field)!r}, expected one of {', '.join(choices)}")
        if self.rotary_layers not in ("all", "first"):
            raise ValueError(f"Preset: rotary_layers is {self.rotary_layers!r}, expected 'all' or 'first'")
        if set(self.activated) - set("qkv"):
            raise ValueError(f"Preset: activated is {self.activated!r}, expected letters of 'qkv'")
        if self.projections == "with_gate" and (self.value_expand != 1 or self.gate == "none"):
            raise ValueError("Preset: projections 'with_gate' needs a gate and value_expand 1")


#: By name. Sources: TransNormerLLM's ``modeling_transnormer.py`` (NormLinearAttention); transformers'
#: ``modeling_minimax.py`` and MiniMax-Text-01's remote code (the same names); ``modeling_bailing_moe_v2_5.py``
#: (BailingMoeV2_5LinearAttention; ``group_norm_size`` of the model's config is norm_groups); torchscale's
#: ``multiscale_retention.py``.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "transnormer": Preset(
            slope="minimax",
            names={"qkv": "qkvu_proj", "out": "out_proj", "norm": "norm", "rotary": "lrpe"},
            projections="with_gate",
            rotary="lrpe",
            rotary_layers="first",
            norm_affine=False,
            gate="linear",
        ),
        "minimax": Preset(
            slope="minimax",
            names={"qkv": "qkv_proj", "gate": "output_gate", "out": "out_proj", "norm": "norm"},
            projections="per_head",
            activated="qkv",
            dropped=("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
        ),
        "ring_linear": Preset(
            slope="bailing_hf",
            names={
                "qkv": "query_key_value",
                "gate": "g_proj",
                "out": "dense",
                "norm": "g_norm",
                "q_norm": "query_layernorm",
                "k_norm": "key_layernorm",
            },
            activated="",
            qk_norm=True,
            rotary="half",
            rotary_fraction=0.5,
            rotary_base=6e6,
            scale="rsqrt",
            norm_groups=4,
        ),
        "retnet": Preset(
            slope="retnet",
            names={
                "q": "q_proj",
                "k": "k_proj",
                "v": "v_proj",
                "gate": "g_proj",
                "out": "out_proj",
                "norm": "group_norm",
            },
            projections="separate",
            activated="",
            rotary="interleaved",
            scale="rsqrt",
            norm_groups=0,
            norm_affine=False,
            gate="silu",
            value_expand=2,
        ),
    }
)
