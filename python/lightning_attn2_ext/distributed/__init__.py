"""More than one device, on torch.distributed. See `lightning_attention_cp`."""

from .context import lightning_attention_cp
from .dtensor import register_sharding_rules

__all__ = ["lightning_attention_cp", "register_sharding_rules"]

register_sharding_rules()
