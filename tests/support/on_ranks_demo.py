"""What the processes of ranks.py run for tests/python/test_distributed_tools.py: the demo's training, bench scale."""

import math

import torch

from lightning_attn2_ext.bench import scale
from lightning_attn2_ext.demo import data, model, parallel, train

RECIPE = train.Recipe(rows=2, length=75, steps=25, seconds=math.inf, rate=4e-3, held_out_rows=1, held_out_length=50)


def corpus():
    text = torch.randint(97, 105, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data.Corpus("eight letters", text, text[:500], 1, 1)


def curve(rank, together):
    """(training curve, parameters) of a few steps, alone or with the windows split over the ranks."""
    torch.manual_seed(0)
    net = model.LanguageModel(model.Size(layers=2, heads=2, head_dim=16, hidden=48, ngram_rows=512)).double()
    shared = parallel.Parallel(RECIPE.length) if together else None
    if together:
        shared.split(net)
    held_out = data.held_out_rows(corpus().held_out, RECIPE.held_out_rows, RECIPE.held_out_length)
    found = train.train(net, corpus(), held_out, RECIPE, 0, shared)
    return found.train, [p.detach() for p in net.parameters()]


def wrong_scale(rank):
    """What bench scale measures of a call whose result is off by a thousandth."""
    chosen = scale.Setting(2, 16, "float32", (96,), (32, 64), (1 << 10, 1 << 12), 1)
    return scale._measure(chosen, "cpu", call=_off_by_a_thousandth), scale._measure(chosen, "cpu")


def _off_by_a_thousandth(*inputs, **options):
    return scale.lightning_attention_cp(*inputs, **options) * 1.001
