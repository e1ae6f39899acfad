"""A serving engine as small as can be: requests that join and leave, beams, drafts; all states in one `StatePool`.

Choices are greedy, so that every way of serving must give the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections import deque

import torch
from torch import Tensor

from ..serving import StatePool
from .model import HISTORY, LanguageModel


def new_pool(model: LanguageModel, slots: int, **options) -> StatePool:
    size, weight = model.size, model.head.weight
    return StatePool(size.layers, slots, size.heads, size.head_dim, size.head_dim, device=weight.device, **options)


def _tokens(model: LanguageModel, text: bytes, last: int | None = None) -> Tensor:
    """``text``, or its ``last`` bytes, with HISTORY bytes before them: int64 on the model's device."""
    count = len(text) if last is None else last
    padded = bytes(HISTORY) + text
    return torch.tensor(list(padded[len(padded) - HISTORY - count :]), device=model.head.weight.device)


@dataclasses.dataclass
class Request:
    """A prompt, and how many bytes are wanted behind it.

    Attributes:
        text: the prompt and what has been written; the last byte of it is not yet in the state.
        slot: while the request is running.
        margin: least distance of the best logit from the second best in any choice made: how near another was.
    """

    prompt: bytes
    count: int
    text: bytes = b""
    slot: int | None = None
    margin: float = float("inf")

    @property
    def written(self) -> bytes:
        return self.text[len(self.prompt) :]

    @property
    def is_done(self) -> bool:
        return len(self.written) >= self.count


class Engine:
    """Continuous batching: every step, waiting requests take free slots and are read together, and all running ones get
    one more byte together; a finished request gives its slot to the next.

    The decode has always as many rows as the pool has slots, those of nobody being padding, as a CUDA graph would need.
    """

    def __init__(self, model: LanguageModel, slots: int, **options):
        self.model, self.pool = model, new_pool(model, slots, **options)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.most_running = 0

    def submit(self, prompt: bytes, count: int) -> Request:
        if not prompt or count < 1:
            raise ValueError(f"Engine: {len(prompt)} bytes and a count of {count}, expected at least 1 of each")
        request = Request(prompt, count, prompt)
        self.waiting.append(request)
        return request

    def step(self) -> None:
        if self.running:
            self._decode()
        joining = [self.waiting.popleft() for _ in range(min(self.pool.num_free, len(self.waiting)))]
        if joining:
            self._prefill(joining)
        self.most_running = max(self.most_running, len(self.running))
        for request in [r for r in self.running if r.is_done]:
            self.pool.free(request.slot)
            request.slot = None
            self.running.remove(request)

    def run(self) -> None:
        while self.waiting or self.running:
            self.step()

    def _prefill(self, joining: list[Request]) -> None:
        slots = self.pool.allocate(len(joining))
        texts = [_tokens(self.model, request.prompt) for request in joining]
        logits = self.model.extend(texts, self.pool, self.pool.indices(slots))
        for request, slot in zip(joining, slots, strict=True):
            request.slot = slot
        self.running += joining
        self._choose(joining, logits)

    def _decode(self) -> None:
        rows = self.pool.slots
        slots = self.pool.indices([request.slot for request in self.running], rows=rows)
        texts = [request.text for request in self.running] + [b""] * (rows - len(self.running))
        tokens = torch.stack([_tokens(self.model, text or b"\0", last=1) for text in texts])
        self._choose(self.running, self.model.decode(tokens, self.pool, slots)[: len(self.running)])

    def _choose(self, requests: list[Request], logits: Tensor) -> None:
        best, chosen = logits.float().topk(2)
        margins, chosen = (best[:, 0] - best[:, 1]).tolist(), chosen[:, 0].tolist()
        for request, token, margin in zip(requests, chosen, margins, strict=True):
            request.text += bytes([token])
            request.margin = min(request.margin, margin)


def one_at_a_time(model: LanguageModel, prompt: bytes, count: int) -> bytes:
    """The same without a pool or a batch, for comparison."""
    text = prompt
    logits, states = model.prefill(_tokens(model, prompt)[None], model.new_states(1))
    logits = logits[:, -1]
    for _ in range(count):
        text += bytes([int(logits.argmax())])
        logits = model.decode(_tokens(model, text, last=1)[None], states)
    return text[len(prompt) :]


@dataclasses.dataclass
class Beam:
    text: bytes
    score: float  # sum of the natural logarithms of its bytes' probabilities


def beam_search(model: LanguageModel, prompt: bytes, count: int, beams: int) -> list[Beam]:
    """The best ``beams`` continuations that a beam search finds, best first.

    The prompt is read once; `fork` gives its state to every beam, and after each choice `copy` gives each beam the
    state of the one that it continues.
    """
    pool = new_pool(model, beams)
    (first,) = pool.allocate(1)
    logits = model.extend([_tokens(model, prompt)], pool, pool.indices([first]))
    found = _best(logits, [Beam(b"", 0.0)], beams)
    slots = [first, *pool.fork(first, len(found) - 1)]
    for _ in range(count - 1):
        rows = torch.stack([_tokens(model, prompt + beam.text, last=1) for _, beam in found])
        logits = model.decode(rows, pool, pool.indices(slots))
        found = _best(logits, [beam for _, beam in found], beams)
        pool.copy([slots[parent] for parent, _ in found], slots)
    return [beam for _, beam in found]


def _best(logits: Tensor, beams: list[Beam], wanted: int) -> list[tuple[int, Beam]]:
    """(index of the beam that it continues, beam) of the best continuations by one byte."""
    scores = torch.log_softmax(logits.double(), -1) + torch.tensor([[b.score] for b in beams], device=logits.device)
    values, places = scores.flatten().topk(wanted)
    found = []
    for score, place in zip(values.tolist(), places.tolist(), strict=True):
        parent, token = divmod(place, scores.shape[1])
        found.append((parent, Beam(beams[parent].text + bytes([token]), score)))
    return found


def score(model: LanguageModel, prompt: bytes, text: bytes) -> float:
    """Of ``text`` behind ``prompt``, all read at once: what `Beam.score` should be."""
    tokens = _tokens(model, prompt + text)[None]
    chances = torch.log_softmax(model(tokens[:, :-1]).double(), -1)[0, len(prompt) - 1 :]
    return chances.gather(1, tokens[0, HISTORY + len(prompt) :, None]).sum().item()


def guess(text: bytes, count: int, look: int = 4) -> bytes:
    """A draft of ``count`` bytes: what stood behind the last ``look`` bytes (or fewer) where they occurred before."""
    for length in range(min(look, len(text) - 1), 0, -1):
        place = text.rfind(text[-length:], 0, len(text) - 1)
        if place >= 0:
            return (text[place + length : place + length + count] + bytes(count))[:count]
    return bytes(count)


@dataclasses.dataclass
class Speculation:
    texts: list[bytes]
    rounds: int  # verifications, of all requests together
    accepted: list[int]  # draft bytes that were right, of each request


def speculate(model: LanguageModel, prompts: list[bytes], count: int, draft: int = 4, guess=guess) -> Speculation:
    """``count`` bytes behind each prompt: ``draft`` at a time are guessed, verified in one call and kept while right.

    A verification reads the byte that was chosen last and the draft behind it. Where the draft is the greedy choice, it
    stands, and the first byte where it is not is corrected by the same call: at least one new byte a round.
    """
    pool = new_pool(model, len(prompts))
    slots = pool.allocate(len(prompts))
    logits = model.extend([_tokens(model, prompt) for prompt in prompts], pool, pool.indices(slots))
    texts = [p + bytes([t]) for p, t in zip(prompts, logits.argmax(-1).tolist(), strict=True)]
    result = Speculation([], 0, [0] * len(prompts))
    wanted = [len(prompt) + count for prompt in prompts]
    while live := [i for i, text in enumerate(texts) if len(text) < wanted[i]]:
        result.rounds += 1
        guesses = [guess(text, draft) for text in texts]
        rows = torch.stack([_tokens(model, t + g, last=1 + draft) for t, g in zip(texts, guesses, strict=True)])
        indices = pool.indices([slot if i in live else -1 for i, slot in enumerate(slots)])
        logits, drafts = model.verify(rows, pool, indices)
        committed = [0] * len(prompts)
        for i, right in enumerate(logits.argmax(-1).tolist()):
            if i not in live:
                continue
            same = next((j for j in range(draft) if guesses[i][j] != right[j]), draft)
            texts[i] += guesses[i][:same] + bytes([right[same]])
            committed[i] = 1 + same
            result.accepted[i] += same
        model.commit(drafts, pool, indices, torch.tensor(committed, dtype=torch.int32, device=pool.device))
    result.texts = [text[len(p) : len(p) + count] for text, p in zip(texts, prompts, strict=True)]
    return result
