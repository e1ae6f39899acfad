"""The decay slopes of the published models, one function per formula.

A head decays by ``lambda = exp(-s)`` per token; these functions give ``s``, shape ``[H]``, float32. Six formulas are
in use and they do not agree, so a checkpoint runs right only with the one that it was trained with:

====================  ========================================================  ====================================
name                  slope of head h (0-based, of H) in layer l (of L)         who uses it
====================  ========================================================  ====================================
``minimax``           alibi(h) * (1 - l / (L - 1) + 1e-5)                       TransNormerLLM code, MiniMax-Text-01
                                                                                and M1, vLLM, SGLang
``hf_minimax``        2^(-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)      transformers ``minimax``
``bailing_hf``        alibi(h) * (1 - (l - 1) / (L - 1) + 1e-5)                 Ring/Ling-linear 2.5, 2.6 remote code
``bailing_serving``   the same as ``minimax``                                   Ring/Ling-linear in vLLM and SGLang
``sala``              alibi(h)                                                  MiniCPM-SALA (no layer factor)
``tnl_paper``         (8 h / H) * (1 - l / L)                                   TransNormerLLM paper, Eq. 10;
                                                                                fla ``chunk_lightning_attn``
``retnet``            -log(1 - 2^(-5 - h))                                      RetNet (torchscale, fla)
====================  ========================================================  ====================================

``alibi(h)`` is the ALiBi sequence (Press et al., arXiv 2108.12409): 2^(-8 (h + 1) / H) when H is a power of two, else
the sequence of the next lower power of two p followed by every other slope of the sequence of 2p.

Everything is computed in float64 and rounded once, whatever the default dtype and device are: evaluated under a
bfloat16 default dtype the same formulas are up to 7 % off. With tensor parallelism the formula is evaluated for all
heads of the model and this rank's share is cut out, because a formula applied to the local head count is another one.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "NAMES",
    "bailing_hf",
    "bailing_serving",
    "hf_minimax",
    "minimax",
    "retnet",
    "sala",
    "slopes",
    "tnl_paper",
]


def _alibi(num_heads: int) -> list[float]:
    power = 1 << (num_heads.bit_length() - 1)
    values = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        finer = [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
        values += finer[: num_heads - power]
    return values


def _layer_factor(layer_idx: int, num_layers: int) -> float:
    # A model of one layer divides by zero in several code bases; those that survive use the factor of layer 0.
    if num_layers == 1:
        return 1.0 + 1e-5
    return 1.0 - layer_idx / (num_layers - 1) + 1e-5


def _minimax(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    factor = _layer_factor(layer_idx, num_layers)
    return [s * factor for s in _alibi(num_heads)]


def _hf_minimax(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    factor = 1.0 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
    return [2.0 ** (-8.0 * (h + 1) / num_heads) * factor for h in range(num_heads)]


def _bailing_hf(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    factor = _layer_factor(layer_idx - 1 if num_layers > 1 else 0, num_layers)
    return [s * factor for s in _alibi(num_heads)]


def _sala(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    return _alibi(num_heads)


def _tnl_paper(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    factor = 1.0 - layer_idx / num_layers
    return [8.0 * h / num_heads * factor for h in range(num_heads)]


def _retnet(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    return [-math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)]


_FORMULAS = {
    "minimax": _minimax,
    "hf_minimax": _hf_minimax,
    "bailing_hf": _bailing_hf,
    "bailing_serving": _minimax,
    "sala": _sala,
    "tnl_paper": _tnl_paper,
    "retnet": _retnet,
}

#: The names that :func:`slopes` takes.
NAMES = tuple(_FORMULAS)


def slopes(
    kind: str,
    num_heads: int,
    layer_idx: int = 0,
    num_layers: int = 1,
    *,
    device: torch.device | str | None = None,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> torch.Tensor:
    """Slopes ``[num_heads / tp_size]`` in float32 by the formula named ``kind`` (one of :data:`NAMES`).

    ``num_heads`` counts the heads of the whole model, ``layer_idx`` is 0-based and counts all layers of the model (in a
    hybrid model the softmax layers too, as the code bases above do). ``device`` is the CPU unless given.
    """
    if kind not in _FORMULAS:
        raise ValueError(f"slopes: kind is {kind!r}, expected one of {', '.join(NAMES)}")
    if num_heads < 1:
        raise ValueError(f"slopes: num_heads is {num_heads}, expected at least 1")
    if num_layers < 1:
        raise ValueError(f"slopes: num_layers is {num_layers}, expected at least 1")
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"slopes: layer_idx is {layer_idx}, expected 0 to {num_layers - 1} (num_layers - 1)")
    if tp_size < 1 or num_heads % tp_size:
        raise ValueError(f"slopes: tp_size is {tp_size}, expected a divisor of num_heads, {num_heads}")
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"slopes: tp_rank is {tp_rank}, expected 0 to {tp_size - 1} (tp_size - 1)")
    values = _FORMULAS[kind](num_heads, layer_idx, num_layers)
    local = num_heads // tp_size
    values = values[tp_rank * local : (tp_rank + 1) * local]
    # A float list goes through the default dtype unless the dtype is named, hence float64 here and one rounding after.
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(torch.float32).to(device or "cpu")


def minimax(num_heads: int, layer_idx: int = 0, num_layers: int = 1, **kwargs) -> torch.Tensor:
    """MiniMax-Text-01 and M1, and TransNormerLLM's code: ``alibi * (1 - l / (L - 1) + 1e-5)``.

    Source: ``build_slope_tensor`` and the slope rate of ``modeling_minimax_m1.py``; vLLM ``minimax_linear_attn.py``.
    """
    return slopes("minimax", num_heads, layer_idx, num_layers, **kwargs)


def hf_minimax(num_heads: int, layer_idx: int = 0, num_layers: int = 1, **kwargs) -> torch.Tensor:
    """transformers' own MiniMax: ``2^(-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)``.

    No ALiBi interpolation, so it differs from :func:`minimax` when H is no power of two (by 56 % at 40 heads).
    Source: ``get_slope_rate`` of ``transformers/models/minimax/modeling_minimax.py``.
    """
    return slopes("hf_minimax", num_heads, layer_idx, num_layers, **kwargs)


def bailing_hf(num_heads: int, layer_idx: int = 0, num_layers: int = 1, **kwargs) -> torch.Tensor:
    """Ring/Ling-linear 2.5 and 2.6 as their remote code has it: ``alibi * (1 - (l - 1) / (L - 1) + 1e-5)``.

    The layer index is shifted by one against the serving code (:func:`bailing_serving`) though it is 0-based in both,
    so the first layer decays faster than ALiBi. Source: ``modeling_bailing_moe_v2_5.py``.
    """
    return slopes("bailing_hf", num_heads, layer_idx, num_layers, **kwargs)


def bailing_serving(num_heads: int, layer_idx: int = 0, num_layers: int = 1, **kwargs) -> torch.Tensor:
    """Ring/Ling-linear as vLLM and SGLang serve it, equal to :func:`minimax`.

    Source: vLLM ``bailing_linear_attn.py``; SGLang ``lightning_backend.py``.
    """
    return slopes("bailing_serving", num_heads, layer_idx, num_layers, **kwargs)


def sala(num_heads: int, layer_idx: int = 0, num_layers: int = 1, **kwargs) -> torch.Tensor:
    """MiniCPM-SALA: plain ALiBi, every layer alike (``lightning_layerwise_decay=False``).

    Source: SGLang ``configs/minicpm.py``.
    """
    return slopes("sala", num_heads, layer_idx, num_layers, **kwargs)


def tnl_paper(num_heads: int, layer_idx: int = 0, num_layers: int = 1, **kwargs) -> torch.Tensor:
    """Eq. 10 of the TransNormerLLM paper: ``(8 h / H) * (1 - l / L)``, h from 0.

    Head 0 does not decay at all. No released checkpoint is known to use it (TransNormerLLM's own code is
    :func:`minimax`). Source: arXiv 2307.14995; ``fla/ops/lightning_attn/chunk.py``.
    """
    return slopes("tnl_paper", num_heads, layer_idx, num_layers, **kwargs)


def retnet(num_heads: int, layer_idx: int = 0, num_layers: int = 1, **kwargs) -> torch.Tensor:
    """RetNet's ``gamma_h = 1 - 2^(-5 - h)`` as a slope: ``-log(gamma_h)``, every layer alike.

    Source: arXiv 2307.08621; torchscale ``retnet.py``; ``fla/ops/retention/chunk.py``.
    """
    return slopes("retnet", num_heads, layer_idx, num_layers, **kwargs)
