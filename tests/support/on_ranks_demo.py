"""What the processes of ranks.py run for tests/python/test_distributed_tools.py: the demo's training, bench scale."""

import math

import torch

from lightning_attn2_ext.bench import scale
from lightning_attn2_ext.demo import data, model, parallel, train
from lightning_attn2_ext.distributed import split_sequence

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


def run_code(rank, code, tokens):
    """Runs code that reads `tokens`, `project`, `slope` and `group`; (its out, out of one process on this rank's
    tokens, labels)."""
    table = torch.randn(3, 50, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def project(inputs):
        return table[:, inputs].transpose(2, 3).unbind(0)

    slope = torch.tensor([0.1, 0.5], dtype=torch.float64)
    names = {"tokens": tokens, "project": project, "slope": slope, "group": torch.distributed.group.WORLD}
    exec(compile(code, "README.md", "exec"), names)
    want = torch.ops.la2.forward(*project(tokens), slope)
    return names["out"], split_sequence(want, 2), names["shard"].labels


def wrong_scale(rank):
    """What bench scale measures of a call whose result is off by a thousandth."""
    chosen = scale.Sizes(2, 16, "float32", (96,), (32, 64), (1 << 10, 1 << 12), 1)
    return scale._measure(chosen, "cpu", call=_off_by_a_thousandth), scale._measure(chosen, "cpu")


def _off_by_a_thousandth(*inputs, **options):
    return scale.lightning_attention_cp(*inputs, **options) * 1.001
