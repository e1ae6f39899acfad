"""Layers over the operators: `LightningAttention` with presets of the published models, and its cache."""

from .attention import LightningAttention
from .presets import PRESETS, Preset
from .state import LayerState

__all__ = ["PRESETS", "LayerState", "LightningAttention", "Preset"]
