"""More than one device, on torch.distributed.

- `lightning_attention_cp`: the operator on sequences whose tokens are spread over ranks (context parallelism).
- `split_batch`, `split_sequence`, `shard_lengths`, `relayout`: who holds what, and from one layout to the other.
- DTensor: importing this package teaches it `torch.ops.la2.*` on shards of the batch and of the heads.
"""

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("lightning_attn2_ext.distributed: this torch is built without torch.distributed")

from .chain import shard_lengths
from .context import lightning_attention_cp
from .dtensor import register_sharding_rules
from .sequence import SplitBatch, relayout, split_batch, split_sequence

__all__ = [
    "SplitBatch",
    "lightning_attention_cp",
    "register_sharding_rules",
    "relayout",
    "shard_lengths",
    "split_batch",
    "split_sequence",
]

register_sharding_rules()
