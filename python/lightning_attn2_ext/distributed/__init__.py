"""More than one device, on torch.distributed. See `lightning_attention_cp`."""

from .context import lightning_attention_cp

__all__ = ["lightning_attention_cp"]
