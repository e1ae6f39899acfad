"""A byte-level language model in the manner of TransNormerLLM; its token mixer is Lightning Attention-2.

The one thing beside the usual blocks is that the embedding adds hashed tables for the last two, three and four bytes:
a model that trains for a minute would otherwise spend that minute on learning to spell. What lies further back than
four bytes reaches a prediction through the mixer's state alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import slopes
from .._ops import _accumulation_dtype
from ..functional import lightning_attention_decode

if TYPE_CHECKING:
    from ..serving import StatePool

VOCABULARY = 256  # bytes
NGRAMS = (2, 3, 4)
HISTORY = max(NGRAMS) - 1  # bytes that the embedding of a byte looks back


@dataclasses.dataclass(frozen=True)
class Size:
    """What the model measures: ``width = heads * head_dim``."""

    layers: int
    heads: int
    head_dim: int
    hidden: int
    ngram_rows: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class Embedding(nn.Module):
    """Bytes ``[B, HISTORY + N]`` to ``[B, N, width]``: the first HISTORY bytes are only looked back at."""

    def __init__(self, size: Size):
        super().__init__()
        self.rows = size.ngram_rows
        self.byte = nn.Embedding(VOCABULARY, size.width)
        self.ngrams = nn.ModuleList(nn.Embedding(size.ngram_rows, size.width) for _ in NGRAMS)
        nn.init.normal_(self.byte.weight, std=1.0)
        for table in self.ngrams:
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1] - HISTORY
        x = self.byte(tokens[:, HISTORY:])
        for order, table in zip(NGRAMS, self.ngrams, strict=True):
            code = torch.zeros_like(tokens[:, :n])
            for back in range(order):
                code = code * 257 + tokens[:, HISTORY - back : HISTORY - back + n] + 1
            x = x + table((code * 0x9E3779B1 >> 15) % self.rows)
        return x


class Mixer(nn.Module):
    """``out(sigmoid(gate x) * norm(la2(silu(q), silu(k), v)))`` with the fixed decay of this layer."""

    def __init__(self, size: Size, layer_idx: int):
        super().__init__()
        self.heads, self.head_dim = size.heads, size.head_dim
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.gate = nn.Linear(size.width, size.width, bias=False)
        self.norm = nn.RMSNorm(size.width)
        self.out = nn.Linear(size.width, size.width, bias=False)
        # Not a buffer on purpose: model.to(bfloat16) would round it, and a slope must stay float32.
        self.slope = slopes.minimax(size.heads, layer_idx, size.layers)
        self.context_parallel: dict | None = None  # options of lightning_attention_cp, where ranks share sequences

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.slope = self.slope.to(self.out.weight.device, _accumulation_dtype(self.out.weight))
        return self

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, H, N, D]``: views into the packed projection, which the op takes as they are."""
        qkv = self.qkv(x)
        q, k, v = qkv.view(*x.shape[:-1], 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return F.silu(q), F.silu(k), v

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        o = o.transpose(1, 2).reshape(*x.shape)
        return self.out(torch.sigmoid(self.gate(x)) * self.norm(o))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        if self.context_parallel is None:
            return self.finish(x, torch.ops.la2.forward(q, k, v, self.slope))
        from ..distributed import lightning_attention_cp

        return self.finish(x, lightning_attention_cp(q, k, v, self.slope, **self.context_parallel))

    def prefill(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.project(x)
        o, state = torch.ops.la2.forward_with_state(q, k, v, self.slope, initial_state=state)
        return self.finish(x, o), state

    def decode(self, x: Tensor, state: Tensor, slots: Tensor | None = None) -> Tensor:
        """One token a row, ``x [B, 1, width]``; the state ``[B, H, D, D]`` is updated in place, or that of each row's
        slot in a pool ``[slots, H, D, D]``."""
        q, k, v = (t.squeeze(2) for t in self.project(x))
        return self.finish(x, lightning_attention_decode(q, k, v, state, self.slope, state_indices=slots).unsqueeze(2))

    def extend(self, x: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The tokens of several requests one behind the other, ``x [1, N, width]``, on from the states of their
        slots."""
        q, k, v = (t[0].transpose(0, 1) for t in self.project(x))
        o = torch.ops.la2.extend(q, k, v, state, cu_seqlens, self.slope, read_slots=slots, write_slots=slots)
        return self.finish(x, o.transpose(0, 1)[None])

    def verify(self, x: Tensor, state: Tensor, slots: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Draft tokens ``x [B, T, width]`` behind the states of their slots, which stay; and what commits them."""
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        o = torch.ops.la2.verify(q, k, v, state, self.slope, state_indices=slots)
        return self.finish(x, o.transpose(1, 2)), (k, v)

    def commit(self, draft: tuple[Tensor, Tensor], state: Tensor, slots: Tensor, num_accepted: Tensor) -> None:
        torch.ops.la2.commit(*draft, state, num_accepted, self.slope, state_indices=slots)


class GatedUnit(nn.Module):
    """SwiGLU: ``down(silu(gate x) * up x)``."""

    def __init__(self, size: Size):
        super().__init__()
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, size: Size, layer_idx: int):
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(size.width), Mixer(size, layer_idx)
        self.unit_norm, self.unit = nn.RMSNorm(size.width), GatedUnit(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.unit(self.unit_norm(x))

    def prefill(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        o, state = self.mixer.prefill(self.mixer_norm(x), state)
        x = x + o
        return x + self.unit(self.unit_norm(x)), state

    def decode(self, x: Tensor, state: Tensor, slots: Tensor | None = None) -> Tensor:
        x = x + self.mixer.decode(self.mixer_norm(x), state, slots)
        return x + self.unit(self.unit_norm(x))

    def extend(self, x: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x + self.mixer.extend(self.mixer_norm(x), state, slots, cu_seqlens)
        return x + self.unit(self.unit_norm(x))

    def verify(self, x: Tensor, state: Tensor, slots: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        o, draft = self.mixer.verify(self.mixer_norm(x), state, slots)
        x = x + o
        return x + self.unit(self.unit_norm(x)), draft


class LanguageModel(nn.Module):
    """Bytes to logits ``[B, N, 256]``; one state ``[B, H, D, D]`` a layer carries all of the past.

    Every method takes HISTORY bytes before those that it reads, for the embedding; :func:`with_history` pads a start.
    """

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.embedding = Embedding(size)
        self.blocks = nn.ModuleList(Block(size, i) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        for name, p in self.blocks.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("mixer.out.weight", "unit.down.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.5 / size.layers**0.5 if residual else 1.0))
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def new_states(self, rows: int) -> list[Tensor]:
        size, weight = self.size, self.head.weight
        shape = (rows, size.heads, size.head_dim, size.head_dim)
        return [torch.zeros(shape, dtype=_accumulation_dtype(weight), device=weight.device) for _ in self.blocks]

    def prefill(self, tokens: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Reads ``tokens [B, HISTORY + N]`` on from ``states``: logits and the states behind the last token."""
        x, after = self.embedding(tokens), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.prefill(x, state)
            after.append(state)
        return self.head(self.norm(x)), after

    def decode(self, tokens: Tensor, states: list[Tensor] | StatePool, slots: Tensor | None = None) -> Tensor:
        """Reads one token a row ``[B, HISTORY + 1]``, updating ``states`` in place: logits ``[B, 256]``.

        ``states`` are those of the rows, or a pool in which ``slots [B]`` are theirs.
        """
        x = self.embedding(tokens)
        for block, state in zip(self.blocks, states, strict=True):
            x = block.decode(x, state, slots)
        return self.head(self.norm(x))[:, 0]

    def extend(self, texts: list[Tensor], pool: StatePool, slots: Tensor) -> Tensor:
        """Reads texts ``[HISTORY + n]`` of different lengths together, each on from its slot: of each the logits behind
        its last token, ``[len(texts), 256]``."""
        x = torch.cat([self.embedding(text[None]) for text in texts], 1)
        ends = list(itertools.accumulate(len(text) - HISTORY for text in texts))
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=x.device)
        for block, state in zip(self.blocks, pool, strict=True):
            x = block.extend(x, state, slots, cu_seqlens)
        return self.head(self.norm(x[0, cu_seqlens[1:] - 1]))

    def verify(self, tokens: Tensor, pool: StatePool, slots: Tensor) -> tuple[Tensor, list]:
        """Logits ``[B, T, 256]`` behind draft tokens ``[B, HISTORY + T]``; states stay. Also what `commit` takes."""
        x, drafts = self.embedding(tokens), []
        for block, state in zip(self.blocks, pool, strict=True):
            x, draft = block.verify(x, state, slots)
            drafts.append(draft)
        return self.head(self.norm(x)), drafts

    def commit(self, drafts: list, pool: StatePool, slots: Tensor, num_accepted: Tensor) -> None:
        """Moves the slots' states behind the first ``num_accepted [B]`` tokens of a verification."""
        for block, draft, state in zip(self.blocks, drafts, pool, strict=True):
            block.mixer.commit(draft, state, slots, num_accepted)


def with_history(tokens: Tensor) -> Tensor:
    """Bytes that start a text, with HISTORY zero bytes before them."""
    return F.pad(tokens, (HISTORY, 0))
