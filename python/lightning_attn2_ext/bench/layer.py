"""``bench layer``: one Lightning layer of transformers' MiniMax, as it is and on this operator, with the same weights.

Times of the whole layer, of its three projections alone, and of the rest: operator, activation, norm and gate. The rest
is timed by itself, in a copy of the layer whose projections in hand out results computed beforehand and whose
projection out hands its input on. (The difference of the other two would be mostly noise.) Those results come from
memory, where the whole layer may still have small ones in L2. Each length is prefilled without a cache, and one token
is decoded for each of a batch. The outputs are checked first, the copy's behind the projection that it lacks, against
the layer in float64: the error may be half as large again as the original's.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from .. import testing
from ..demo import progress
from . import machine, report

#: Hidden size, heads and head dim of MiniMax-Text-01, and its 80 layers.
SHAPE = {"hidden_size": 6144, "num_attention_heads": 64, "head_dim": 128, "num_hidden_layers": 80}
QUICK_SHAPE = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 80}
AS_IS, OURS, COMPILED = "transformers", "la2", "la2, compiled"
REST = "rest_ms: the layer timed with the results of its projections in given, and without its projection out"


def _cache(state: Tensor):
    """A cache that holds the state of this one layer."""
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    cache = MiniMaxCache()
    cache.set_linear_cache(0, state)
    return cache


def layers(shape: dict, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, nn.Module]:
    """The layer in float64, and in dtype as transformers has it and patched, with the same weights."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    from ..integrations import transformers as integration

    torch.manual_seed(seed)
    config = MiniMaxConfig(**shape, layer_types=["linear_attention"] * shape["num_hidden_layers"])
    with device:
        as_is = MiniMaxLightningAttention(config, 0).requires_grad_(False)
    # Their weights are rounded to dtype, their slopes and decays are not.
    exact = copy.deepcopy(as_is)
    for p in exact.parameters():
        p.copy_(p.to(dtype))
    exact, as_is = exact.double(), as_is.to(dtype)
    ours = copy.deepcopy(as_is)
    integration.patch(ours)
    return {"exact": exact, AS_IS: as_is, OURS: ours}


def projections(layer: nn.Module, x: Tensor, wide: Tensor) -> Tensor:
    layer.qkv_proj(x)
    layer.output_gate(x)
    return layer.out_proj(wide)


class Given(nn.Module):
    """In a projection's place: its result."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.register_buffer("result", result)

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def without_projections(layer: nn.Module, x: Tensor) -> nn.Module:
    """A copy that does for x, and for no other input, what the layer does between its projections, and returns what
    would be projected out. Compiled it does all of that too: what it returns depends on all of it, and what is given
    is an input of the graph like any parameter, so that nothing can be computed ahead."""
    stand_ins = {name: Given(getattr(layer, name)(x)) for name in ("qkv_proj", "output_gate")}
    stand_ins["out_proj"] = nn.Identity()
    return copy.deepcopy(layer, {id(getattr(layer, name)): module for name, module in stand_ins.items()})


def _call(layer: nn.Module, x: Tensor, state: Tensor | None, is_ours: bool = False) -> Tensor:
    cache = None if state is None else _cache(state)
    if is_ours and cache is not None:
        from ..integrations import transformers as integration

        cache = integration.adopt_cache(cache)
    return layer(x, None, None, cache)[0]


def measure(
    what: str, modules, x: Tensor, state: Tensor | None, clock, repeats: int, is_compiled: bool = False
) -> list[dict]:
    """Rows for both layers on one input, and for ours compiled; ``state`` float32, or None for a prefill."""
    whole = {name: modules[name] for name in (AS_IS, OURS)}
    rest = {name: without_projections(layer, x) for name, layer in whole.items()}
    if is_compiled:
        torch.compiler.reset()  # of one function torch keeps no more than eight compilations
        for each in (whole, rest):
            each[COMPILED] = torch.compile(each[OURS], fullgraph=True, dynamic=False)
    wide = modules[AS_IS].norm.weight.numel()
    wide = torch.ones(*x.shape[:2], wide, dtype=x.dtype, device=x.device)
    want = _call(modules["exact"], x.double(), None if state is None else state.double())
    # As transformers has it the cache is in the dtype of the layer.
    states = {AS_IS: None if state is None else state.to(x.dtype), OURS: state, COMPILED: state}
    errors = {}
    for name in whole:
        own = [None if state is None else states[name].clone() for _ in range(2)]
        found = _call(whole[name], x, own[0], name != AS_IS)
        between = modules[AS_IS].out_proj(_call(rest[name], x, own[1], name != AS_IS))
        errors[name] = [testing.error(y, want).l2 for y in (found, between)]
    del want, found, between
    rows = []
    alone = clock.median(lambda: projections(modules[AS_IS], x, wide), repeats)

    def timed(layer: nn.Module, name: str) -> float:
        return clock.median(lambda: _call(layer, x, states[name], name != AS_IS), repeats)

    for name in whole:
        row = {"what": what, "op": name, "ms": timed(whole[name], name)}
        row |= {"projections_ms": alone, "rest_ms": timed(rest[name], name)}
        bound = testing.MARGIN * errors[AS_IS][0] + torch.finfo(x.dtype).eps / 2
        row |= {"error": max(errors[name]), "passed": all(e <= bound for e in errors[name])}  # False for NaN
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        base = next(o for o in rows if o["op"] == AS_IS and o["what"] == r["what"])
        ratios = [f"{base[k] / r[k]:.1f}x" for k in ("ms", "rest_ms")]
        cells = [f"{r[k]:.3f}" for k in ("ms", "projections_ms", "rest_ms")]
        verdict = f"{r['error']:.1e}" if r["passed"] else f"WRONG {r['error']:.1e}"
        lines.append([r["what"], r["op"], *cells, *ratios, verdict])
    heading = ["", "layer", "layer ms", "projections ms", "rest ms", "layer", "rest", "error"]
    return report.table(heading, lines, texts=2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench layer", description=__doc__)
    machine.add_arguments(parser)
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="prefills (default 4096 16384; CPU 1024)")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="decodes (default 1 64; CPU 4)")
    parser.add_argument("--hidden", type=int, help="hidden size (default 6144; CPU 768)")
    parser.add_argument("--heads", type=int, help="heads of 128 (default 64; CPU 8)")
    parser.add_argument("--compile", action="store_true", help="the patched layer under torch.compile too")
    parser.add_argument("--repeats", type=int, help="timed calls of which the median is shown (default 20, CPU 3)")
    arguments = parser.parse_args(argv)
    try:
        import transformers
    except ImportError:
        print("bench layer needs transformers (pip install transformers)")
        return 2
    device, dtype, facts = machine.open_machine(arguments)
    gpu = device.type == "cuda"
    shape = QUICK_SHAPE if arguments.quick else SHAPE
    if not arguments.quick:
        hidden, heads = arguments.hidden or (6144 if gpu else 768), arguments.heads or (64 if gpu else 8)
        shape = shape | {"hidden_size": hidden, "num_attention_heads": heads}
    lengths = arguments.lengths or ((300,) if arguments.quick else (4096, 16384) if gpu else (1024,))
    batches = arguments.batches or ((3,) if arguments.quick else (1, 64) if gpu else (4,))
    repeats = arguments.repeats or (20 if gpu else 1 if arguments.quick else 3)
    facts |= {"transformers": transformers.__version__, "shape": shape, "rest": REST}
    print(f"transformers {transformers.__version__}, {shape}, {facts['dtype']}; medians of {repeats}")
    clock, rows = machine.clock_for(device), []
    modules = layers(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    heads, dim = shape["num_attention_heads"], shape["head_dim"]
    bar = progress.bar(len(lengths) + len(batches), unit="case")
    with torch.no_grad():
        for n in lengths:
            x = normal(1, n, shape["hidden_size"]).to(dtype)
            rows += measure(f"prefill of {n} tokens", modules, x, None, clock, repeats, arguments.compile)
            bar.update(1)
        for batch in batches:
            x, state = normal(batch, 1, shape["hidden_size"]).to(dtype), normal(batch, heads, dim, dim)
            rows += measure(f"one token for each of {batch}", modules, x, state, clock, repeats, arguments.compile)
            bar.update(1)
    bar.close()
    print("\n" + table(rows) + "\n" + REST)
    if arguments.json:
        report.write_json(arguments.json, "layer", facts, rows)
    return 0 if all(r["passed"] for r in rows) else 1
