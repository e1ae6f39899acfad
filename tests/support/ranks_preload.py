"""What the processes of ranks.py have in common."""

import torch.distributed.tensor  # noqa: F401

import lightning_attn2_ext.distributed  # noqa: F401
from tests.support import cases, tolerance  # noqa: F401
