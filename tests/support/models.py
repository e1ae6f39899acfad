"""A small language model of `nn.LightningAttention` layers, for tests of what torch does with whole models."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_attn2_ext.nn import LayerState, LightningAttention

VOCABULARY = 61


class Block(nn.Module):
    def __init__(self, width, heads, layer_idx, num_layers, preset):
        super().__init__()
        self.mixer_norm, self.unit_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mixer = LightningAttention(width, heads, layer_idx, num_layers, preset=preset)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, **options):
        x = x + self.mixer(self.mixer_norm(x), **options)
        return x + self.down(F.silu(self.up(self.unit_norm(x))))


class LanguageModel(nn.Module):
    def __init__(self, preset, width=32, heads=2, num_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads, i, num_layers, preset) for i in range(num_layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.checkpoints = False

    def forward(self, tokens, states=None, **options):
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, state=None if states is None else states[i], **options)
        return self.head(x)

    def new_states(self, batch):
        return [block.mixer.new_state(batch) for block in self.blocks]


class Served(nn.Module):
    """The model as a function of tensors alone, for export: states and lengths ``[layers, ...]`` are updated in
    place."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, states, lengths):
        views = [LayerState(states[i], lengths[i]) for i in range(len(self.model.blocks))]
        return self.model(tokens, views)


def tokens(batch, length, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
