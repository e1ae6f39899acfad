"""(c) Inference: tokens/s of a model at a position, behind a context that it has read, up to a million tokens.

The model is a TransNormerLLM of 0.4B from experiment (b) (on a CPU a tiny one) with a state for each layer. The context
is read in pieces, each point on from the one before; then one token after the other is taken, on a GPU by a CUDA graph.
Beside it the same model with softmax attention over a cache of keys and values of the position's length.
"""

from __future__ import annotations

import copy
import pathlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import testing
from ...nn import LightningAttention
from ...nn.attention import activate
from ...nn.parts import GroupRMSNorm
from .. import plots, report, train
from . import training
from .run import Run

LETTER, TITLE = "c", "Inference tokens/s against position"
OURS, SOFTMAX = "la2", "softmax with a cache"
STEPS = 16  # tokens that are taken at a position
CHECKED = 32  # tokens, each by itself, whose logits are compared with float64
CACHE_SHARE = 0.7  # of the free memory that a cache may take


class Block(nn.Module):
    """train.Block with a state."""

    def __init__(self, size: train.Size, layer_idx: int):
        super().__init__()
        self.mixer = _Mixer(size.width, size.heads, layer_idx, size.layers, preset="transnormer")
        self.norm = GroupRMSNorm(size.width, affine=False)
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, state) -> Tensor:
        x = x + self.mixer(self.norm(x), state=state)
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(gate * up)


class _Mixer(LightningAttention):
    """The layer as it is published; `plain_chunk` puts plain PyTorch in the operator's place, states and all."""

    plain_chunk: int | None = None
    cache: tuple[Tensor, Tensor] | None = None  # keys and values: softmax attention over them, at their last position

    def _attend(self, q, k, v, silu, mask, cu_seqlens, state):
        if self.cache is None and self.plain_chunk is None:
            return super()._attend(q, k, v, silu, mask, cu_seqlens, state)
        q, k, v = activate(q, k, v, silu)
        if self.cache is not None:
            keys, values = self.cache
            keys[:, :, -1:], values[:, :, -1:] = k[..., : keys.shape[-1]], v
            return F.scaled_dot_product_attention(q[..., : keys.shape[-1]], keys, values)
        slope = self.slope.to(testing.accumulation_dtype(q.dtype))
        out, after = testing.chunked(
            q, k, v, slope, initial_state=state.state, scale=self.scale, chunk=self.plain_chunk
        )
        state.store(after, state.length + q.shape[2])
        return out


class _SameAngles(nn.Module):
    """An Lrpe in float64 but for its angles: those of a position of a million are off by 1/20 in float32, which is the
    layer's own matter, and would hide what the step is off by."""

    def __init__(self, lrpe: nn.Module):
        super().__init__()
        self.theta = lrpe.theta

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = (self.theta.squeeze(1).float() * positions[:, :, None, None].float()).double()
        return torch.cat((x * angles.cos(), x * angles.sin()), -1)


class Model(nn.Module):
    def __init__(self, size: train.Size, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size, i) for i in range(size.layers))
        self.norm = GroupRMSNorm(size.width, affine=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, states) -> Tensor:
        """``[B, N]`` to the logits of the last token."""
        x = self.embedding(tokens)
        for block, state in zip(self.blocks, states, strict=True):
            x = block(x, state)
        return self.norm(x[:, -1]) @ self.embedding.weight.T

    def new_states(self, batch: int):
        return [block.mixer.new_state(batch) for block in self.blocks]


class _Reader:
    """The model with the states behind the tokens read so far."""

    def __init__(self):
        self.model = self.states = None
        self.position = 0

    def at(self, run: Run, position: int):
        if self.model is None:
            torch.manual_seed(0)
            size, vocabulary = (training.SMALL, 256) if run.small else (training.SIZES["0.4B"], training.VOCABULARY)
            with run.device:
                self.model = Model(size, vocabulary).to(run.dtype)
        if self.states is None or self.position > position:
            self.states, self.position = self.model.new_states(1), 0
        piece = 256 if run.quick else 32768
        while self.position < position:
            n = min(piece, position - self.position)
            self.model(tokens_at(run, self.model, self.position, n), self.states)
            self.position += n
        return self.model, self.states


def tokens_at(run: Run, model: Model, position: int, n: int, batch: int = 1) -> Tensor:
    vocabulary = model.embedding.num_embeddings
    return torch.randint(vocabulary, (batch, n), device=run.device, generator=run.generator(position))


_reader = _Reader()


def release() -> None:
    global _reader
    _reader = _Reader()


def points(run: Run) -> list[dict]:
    last = 1024 if run.quick else 1 << 20 if run.gpu else 1 << 15
    positions = [1 << i for i in range(8 if run.quick else 10, 21, 1 if run.quick else 2) if 1 << i <= last]
    batches = (1, 4) if run.quick else (1, 64) if run.gpu else (1,)
    found = [{"op": OURS, "batch": b, "n": n} for n in positions for b in batches]
    return found + [{"op": SOFTMAX, "batch": b, "n": n} for b in batches for n in positions]


@torch.no_grad()
def measure(run: Run, config: dict) -> dict:
    n, batch = config["n"], config["batch"]
    if config["op"] == SOFTMAX:
        return _with_cache(run, n, batch)
    model, states = _reader.at(run, n)
    rows = torch.zeros(batch, dtype=torch.int64, device=run.device)
    states = [s.select(rows) for s in states]
    result = verdict(run, model, [s.select(rows.new_zeros(CHECKED)) for s in states], n)
    if not result["passed"]:
        return result
    seconds = step_seconds(run, model, states, n)
    held = sum(s.state.numel() * s.state.element_size() for s in states)
    return result | {"step_ms": seconds * 1e3, "tokens_per_s": batch / seconds, "held_bytes": held}


def verdict(run: Run, model: Model, states, n: int) -> dict:
    """One step from the states, with CHECKED tokens, against the same in float64; bound by what plain PyTorch is off
    by (of a single token by luck next to nothing)."""
    token = tokens_at(run, model, n, 1, CHECKED)

    def logits(model, dtype=None):
        copies = [s.clone() for s in states]
        for s in copies:
            s.state = s.state if dtype is None else s.state.to(dtype)
        return model(token, copies)

    def with_plain(model, chunk):
        for block in model.blocks:
            block.mixer.plain_chunk = chunk
        return model

    got = logits(model)
    exact = copy.deepcopy(model).double()
    exact.blocks[0].mixer.lrpe = _SameAngles(exact.blocks[0].mixer.lrpe)
    want = {"logits": logits(with_plain(exact, 1), torch.float64)}
    del exact
    # One token has one chunk, whatever its length.
    others = [{"logits": logits(with_plain(model, 1))}]
    with_plain(model, None)
    error, bound = testing.error(got, want["logits"]).l2, testing.bounds(want, others)["logits"].l2
    return {"errors": {"logits": error}, "bounds": {"logits": bound}, "passed": error <= bound}


def step_seconds(run: Run, model: Model, states, n: int) -> float:
    """Of one token for each row of the states, the least of some: the batch is what it is, and waits for nobody."""
    batch = states[0].state.shape[0]
    token = tokens_at(run, model, n, 1, batch)
    model(token, states)
    if not run.gpu:
        return min(run.seconds(lambda: model(token, states)) for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(run.device)
    side.wait_stream(torch.cuda.current_stream(run.device))
    with torch.cuda.stream(side):
        model(token, states)
    torch.cuda.current_stream(run.device).wait_stream(side)
    with torch.cuda.graph(graph):
        model(token, states)

    def steps():
        for _ in range(STEPS):
            graph.replay()

    steps()
    return min(run.seconds(steps) for _ in range(3)) / STEPS


def _with_cache(run: Run, n: int, batch: int) -> dict:
    model, _ = _reader.at(run, _reader.position if _reader.states is not None else 0)
    size = training.SMALL if run.small else training.SIZES["0.4B"]
    dim = size.width // size.heads
    needed = 2 * size.layers * batch * n * size.width * run.dtype.itemsize
    free = torch.cuda.mem_get_info(run.device)[0] if run.gpu else 8 << 30
    if needed > CACHE_SHARE * free:
        return {"skipped": f"a cache of {needed / 2**30:,.0f} GiB", "passed": True}
    states = model.new_states(batch)
    try:
        for block in model.blocks:
            shape = (batch, size.heads, n, dim)
            block.mixer.cache = tuple(
                torch.zeros(shape, dtype=run.dtype, device=run.device).normal_() for _ in range(2)
            )
        seconds = step_seconds(run, model, states, n)
    finally:
        for block in model.blocks:
            block.mixer.cache = None
        run.free_memory()
    return {"step_ms": seconds * 1e3, "tokens_per_s": batch / seconds, "held_bytes": needed, "passed": True}


def flatness(rows: list[dict]) -> tuple[int, int, float] | None:
    mine = {r["n"]: r["tokens_per_s"] for r in rows if r["op"] == OURS and r["batch"] == 1 and r.get("tokens_per_s")}
    return (min(mine), max(mine), mine[max(mine)] / mine[min(mine)]) if len(mine) > 1 else None


def section(rows: list[dict]) -> str:
    lines = []
    for r in sorted(rows, key=lambda r: (r["batch"], r["n"], r["op"])):
        lead = [f"batch {r['batch']}, behind {r['n']:,}", r["op"]]
        if not r.get("tokens_per_s"):
            lines.append([*lead, r.get("skipped") or r.get("failed") or "WRONG RESULT", "-", "-", "-"])
            continue
        error = f"{r['errors']['logits']:.1e}" if "errors" in r else "-"
        cells = [f"{r['step_ms']:.3f}", f"{r['tokens_per_s']:,.0f}", f"{r['held_bytes'] / 2**20:,.1f}", error]
        lines.append([*lead, *cells])
    table = report.table(["", "model", "step ms", "tokens/s", "state or cache MiB", "error"], lines, texts=2)
    text = [" ".join(__doc__.split("\n\n", 1)[1].split()), table]
    if flat := flatness(rows):
        text.append(f"tokens/s behind {flat[1]:,} are {100 * flat[2]:.1f} % of those behind {flat[0]:,} (batch 1).")
    return "\n\n".join(text)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    series: dict[str, list[tuple[float, float]]] = {}
    for r in sorted(rows, key=lambda r: r["n"]):
        if r.get("tokens_per_s"):
            series.setdefault(f"{r['op']}, batch {r['batch']}", []).append((r["n"], r["tokens_per_s"]))
    if not series:
        return []
    path = folder / "c_inference.png"
    plots.lines(path, series, title="inference", x="position", y="tokens/s", caption=caption)
    return [path]
