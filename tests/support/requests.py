"""Calls of la2::extend: requests against a pool of states, and what must come of them."""

import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case, accumulation_dtype
from tests.support.pools import bits, pool_of
from tests.support.tolerance import check_forward

la2 = torch.ops.la2


class Problem:
    """Requests and everything that extend takes. Of each request `slots` (read, write), `snapshots` [(count, slot)]."""

    def __init__(self, device, lengths, *, slots=None, fresh=(), snapshots=None, tail=0, heads=2, dims=(40, 24),
                 dtype=torch.float32, pool="kv", pool_dtype=None, index_dtype=torch.int32, slope="mixed",
                 per_request=False, scale=0.5, num_slots=None, seed=0):  # fmt: skip
        self.lengths, self.index_dtype, self.scale, self.device = lengths, index_dtype, scale, device
        self.slots = slots if slots is not None else [(r, r) for r in range(len(lengths))]
        self.has_slots = slots is not None
        self.fresh = fresh  # requests without an initial state
        self.snapshots = snapshots or [[] for _ in lengths]
        self.tokens = sum(lengths) + tail
        case = Case(heads=heads, length=max(self.tokens, 1), key_dim=dims[0], value_dim=dims[1], dtype=dtype,
                    slope=slope, layout="bnhd", state_layout=None, seed=seed)  # fmt: skip
        x = case.make(device)
        self.inputs = x
        self.q, self.k, self.v = (t[0].transpose(0, 1)[: self.tokens] for t in (x.q, x.k, x.v))  # [tokens, H, D]
        self.slope = x.slope
        if per_request and x.slope is not None:
            self.slope = torch.stack([x.slope * (1 + r) for r in range(len(lengths))])
        if num_slots is None:
            used = [s for pair in self.slots for s in pair] + [s for m in self.snapshots for _, s in m]
            num_slots = max(used, default=0) + 3
        acc = accumulation_dtype(dtype)
        self.state = pool_of((num_slots, heads, *dims), pool, pool_dtype or acc, device)

    @property
    def ends(self):
        return [sum(self.lengths[:r]) for r in range(len(self.lengths) + 1)]

    def index(self, values):
        return torch.tensor(values, dtype=self.index_dtype, device=self.device)

    @property
    def options(self):
        found = {"scale": self.scale}
        if self.has_slots:
            found["read_slots"] = self.index([r for r, _ in self.slots])
            if any(r != w for r, w in self.slots):
                found["write_slots"] = self.index([w for _, w in self.slots])
        if self.fresh:
            known = [r not in self.fresh for r in range(len(self.lengths))]
            found["has_initial_state"] = torch.tensor(known, device=self.device)
        if any(self.snapshots):
            counts = [len(m) for m in self.snapshots]
            found["snapshot_offsets"] = self.index([sum(counts[:r]) for r in range(len(counts) + 1)])
            found["snapshot_tokens"] = self.index([count for m in self.snapshots for count, _ in m])
            found["snapshot_slots"] = self.index([slot for m in self.snapshots for _, slot in m])
        return found

    def run(self, state=None):
        state = self.state if state is None else state
        return la2.extend(self.q, self.k, self.v, state, self.index(self.ends), self.slope, **self.options)

    def initial(self, r, before):
        read = self.slots[r][0]
        if read < 0 or r in self.fresh:
            return torch.zeros_like(before[0])
        return before[read]

    def sequences(self, before, pieces):
        """The packed forward over [(request, tokens from its start)], from the states in the pool `before`."""
        begins = [self.ends[r] for r, _ in pieces]
        counts = [n for _, n in pieces]
        rows = torch.cat([torch.arange(b, b + n, device=self.device) for b, n in zip(begins, counts, strict=True)])
        acc = accumulation_dtype(self.q.dtype)
        slope = self.slope
        if slope is not None and slope.dim() == 2:
            slope = slope[[r for r, _ in pieces]]
        packed = {name: getattr(self, name)[rows].transpose(0, 1)[None] for name in ("q", "k", "v")}
        cu_seqlens = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], device=self.device)
        state = torch.stack([self.initial(r, before) for r, _ in pieces]).to(acc)
        return self.inputs.replace(**packed, slope=slope, cu_seqlens=cu_seqlens, initial_state=state, scale=self.scale)

    def check(self, out, before, after):
        """Outputs, states, snapshots, and that everything else is untouched or zero."""
        live = [r for r, pair in enumerate(self.slots) if max(pair) >= 0]
        ends = self.ends
        assert out.shape == (self.tokens, *self.v.shape[1:]) and out.dtype == self.q.dtype
        zero = [i for r in range(len(self.lengths)) if r not in live for i in range(ends[r], ends[r + 1])]
        assert not out[zero + list(range(ends[-1], self.tokens))].any()
        if live:
            x = self.sequences(before, [(r, self.lengths[r]) for r in live])
            rows = [i for r in live for i in range(ends[r], ends[r + 1])]
            check_forward(x, out[rows].transpose(0, 1)[None])
        pieces = [(r, self.lengths[r], w) for r, (_, w) in enumerate(self.slots) if w >= 0]
        pieces += [(r, n, slot) for r, found in enumerate(self.snapshots) for n, slot in found if slot >= 0]
        if pieces:
            written = after[[slot for *_, slot in pieces]]
            check_forward(self.sequences(before, [(r, n) for r, n, _ in pieces]), None, written.to(x_acc(self.q)))
        others = sorted(set(range(len(after))) - {slot for *_, slot in pieces})
        assert torch.equal(bits(after[others]), bits(before[others]))

    def run_and_check(self):
        before = self.state.clone()
        out = self.run()
        self.check(out, before, self.state)
        return out


def x_acc(q):
    return accumulation_dtype(q.dtype)


def slots_of(lengths, apart=True):
    """Distinct slots in no order; every other request writes elsewhere if `apart`."""
    count = len(lengths)
    reads = torch.randperm(2 * count, generator=torch.Generator().manual_seed(count)).tolist()[:count]
    return [(slot, 2 * count + r if apart and r % 2 == 0 else slot) for r, slot in enumerate(reads)]
