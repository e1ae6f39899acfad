"""(g) Other architectures: the token mixers of published models, forward and backward, with the operator exchanged.

Each is `nn.LightningAttention` with the preset of its family. Exactness: the layer in the dtype of the run against the
same weights in float64, and the same for the layer with the chunked form in plain PyTorch, whose error times 1.5 is the
bound. "softmax" is the same layer around softmax attention: another function, for its time alone.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib

import torch
from torch import Tensor, nn

from ... import testing
from .. import plots, report
from .run import Layer, Run, ours, plain, softmax

LETTER, TITLE = "g", "Other architectures"


@dataclasses.dataclass(frozen=True)
class Family:
    preset: str
    hidden: int
    heads: int
    layers: int = 1
    softmax_every: int = 0  # the last of so many layers attends by softmax


FAMILIES = {
    "TransNormerLLM-15B layer": Family("transnormer", 5120, 40),
    "MiniMax-Text-01 layer": Family("minimax", 6144, 64),
    "Ring/Ling-flash layer": Family("ring_linear", 4096, 32),
    "RetNet layer, E = 2 D": Family("retnet", 2048, 16),
    "hybrid 7:1, 8 MiniMax layers": Family("minimax", 2048, 16, 8, 8),
}
OPERATORS = {"la2": ours, "plain PyTorch": plain(128), "softmax": softmax}
CHECKED = 512  # tokens that float64 sees


def points(run: Run) -> list[dict]:
    lengths = (96,) if run.quick else (8192, 32768) if run.gpu else (2048,)
    return [
        {"layer": f, "op": op, "n": n}
        for n in lengths
        for f in FAMILIES
        for op in OPERATORS
        if op != "plain PyTorch" or n == lengths[0]
    ]


class Stack(nn.Module):
    """``x + mixer(norm(x))``, as many as there are layers."""

    def __init__(self, family: Family, head_dim: int, operator, device, dtype):
        super().__init__()
        self.mixers = nn.ModuleList(
            Layer(
                family.hidden,
                family.heads,
                i,
                max(family.layers, 32),
                preset=family.preset,
                head_dim=head_dim,
                device=device,
            )
            for i in range(family.layers)
        )
        self.norm = nn.RMSNorm(family.hidden, elementwise_affine=False)
        self.family = family
        self.to(dtype)
        self.use(operator)

    def use(self, operator) -> Stack:
        every = self.family.softmax_every
        for i, mixer in enumerate(self.mixers):
            mixer.operator = softmax if every and i % every == every - 1 else operator
        return self

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + mixer(self.norm(x))
        return x


def family_of(run: Run, name: str) -> tuple[Family, int]:
    family = FAMILIES[name]
    if run.small:
        return dataclasses.replace(family, hidden=64, heads=4), 16
    return family, 128


_last: dict[str, Stack] = {}


def stack_of(run: Run, name: str) -> Stack:
    if name not in _last:
        release()
        run.free_memory()
        torch.manual_seed(0)
        _last[name] = Stack(*family_of(run, name), ours, run.device, run.dtype)
    return _last[name]


def release() -> None:
    _last.clear()


def gradients(stack: Stack, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    out = stack(leaf)
    return {"out": out.detach(), "dx": torch.autograd.grad(out, leaf, grad_out)[0]}


def verdict(stack: Stack, x: Tensor, grad_out: Tensor) -> dict:
    """Ours against float64, bounded by what plain PyTorch is off by."""
    # The hybrid's softmax layer is a kernel of torch's in either, so what is compared is ours alone.
    exact = copy.deepcopy(stack).double().use(plain(128))
    want = gradients(exact, x.double(), grad_out.double())
    del exact
    others = [gradients(stack.use(plain(chunk)), x, grad_out) for chunk in (16, 64, 128)]
    got = gradients(stack.use(ours), x, grad_out)
    bounds = {name: b.l2 for name, b in testing.bounds(want, others).items()}
    errors = {name: testing.error(got[name], want[name]).l2 for name in want}
    return {"errors": errors, "bounds": bounds, "passed": all(errors[n] <= bounds[n] for n in errors)}


def measure(run: Run, config: dict) -> dict:
    stack, n, op = stack_of(run, config["layer"]), config["n"], config["op"]
    width = stack.family.hidden
    generator = run.generator(1)
    x, grad_out = (torch.randn(1, n, width, generator=generator, device=run.device).to(run.dtype) for _ in range(2))
    result = {"passed": True}
    if op == "la2":
        result = verdict(stack, x[:, :CHECKED], grad_out[:, :CHECKED])
        if not result["passed"]:
            return result
    stack.use(OPERATORS[op])
    leaf = x.detach().requires_grad_()

    def forward():
        with torch.no_grad():
            return stack(x)

    def both():
        out = stack(leaf)
        return torch.autograd.grad(out, [leaf, *stack.parameters()], grad_out)

    for name, call in (("forward_ms", forward), ("both_ms", both)):
        call()
        result[name] = run.median(call)
    stack.use(ours)
    return result | {"tokens_per_s": n / result["both_ms"] * 1e3}


def summary(rows: list[dict]) -> str | None:
    mine = [r for r in rows if r["op"] == "la2" and r.get("both_ms")]
    names = {r["layer"] for r in mine}
    return (
        f"{len(names)} architectures within the bound of plain PyTorch: {', '.join(sorted(names))}" if names else None
    )


def section(rows: list[dict]) -> str:
    lines = []
    order = {name: i for i, name in enumerate(FAMILIES)}
    for r in sorted(rows, key=lambda r: (order[r["layer"]], r["n"], list(OPERATORS).index(r["op"]))):
        lead = [f"{r['layer']}, N = {r['n']:,}", r["op"]]
        if not r.get("both_ms"):
            lines.append([*lead, r.get("skipped") or r.get("failed") or "WRONG RESULT", "-", "-", "-"])
            continue
        shown = "-"
        if "errors" in r:
            worst = max(r["errors"], key=lambda x: r["errors"][x] / r["bounds"][x])
            shown = f"{r['errors'][worst]:.1e} of {r['bounds'][worst]:.1e}"
        times = [f"{r['forward_ms']:.3f}", f"{r['both_ms']:.3f}", f"{r['tokens_per_s']:,.0f}"]
        lines.append([*lead, *times, shown])
    table = report.table(["layer", "operator", "fwd ms", "fwd + bwd ms", "tokens/s", "error of bound"], lines, texts=2)
    return " ".join(__doc__.split("\n\n", 1)[1].split()) + "\n\n" + table


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    series: dict[str, list[tuple[float, float]]] = {}
    for r in sorted(rows, key=lambda r: r["n"]):
        if r["op"] == "la2" and r.get("tokens_per_s"):
            series.setdefault(r["layer"], []).append((r["n"], r["tokens_per_s"]))
    if not series:
        return []
    path = folder / "g_layers.png"
    plots.lines(path, series, title="forward + backward of one layer", x="length", y="tokens/s", caption=caption)
    return [path]
