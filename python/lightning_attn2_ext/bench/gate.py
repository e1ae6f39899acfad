"""Right or wrong: a benchmark shows no time for a result that did not pass here.

The truth is the chunked recurrence in float64 at the full shape, a few heads at a time so that it fits; for softmax
attention, which is another operator, it is the formula on sampled rows. What a result may be off by is derived as in
``testing.py``: from the error of the same maths in plain PyTorch in the dtype of the inputs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import testing

#: Elements of one tensor that are held in float64 at a time.
_ELEMENTS = 1 << 26

#: A peer that rounds more often than plain PyTorch is less accurate, not wrong; ours has testing.MARGIN.
PEER_MARGIN = 4.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Relative L2 errors by tensor, and what they may be."""

    errors: dict[str, float]
    bounds: dict[str, float]

    @property
    def passed(self) -> bool:
        return bool(self.errors) and all(self.errors[n] <= self.bounds[n] for n in self.errors)  # NaN does not pass

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=float("nan"))

    def __str__(self) -> str:
        parts = [f"{n} {e:.1e} (bound {self.bounds[n]:.1e})" for n, e in self.errors.items()]
        return ", ".join(parts)


def _sweep(a: Tensor, b: Tensor, c: Tensor, slope: Tensor, reverse: bool, chunk: int = 256) -> Tensor:
    """``sum over j <= i of lambda^(i - j) (a_i . b_j) c_j`` (j >= i when reverse), float64, chunk by chunk."""
    n = a.shape[2]
    r = torch.arange(chunk, device=a.device, dtype=torch.float64)
    s = slope.double()[None, :, None, None]
    gap = r[:, None] - r[None, :]
    if reverse:
        gap = -gap
    mask = torch.where(gap >= 0, torch.exp(-s * gap.clamp(min=0)), 0)
    out = torch.empty(*a.shape[:3], c.shape[-1], dtype=torch.float64, device=a.device)
    # `entering` is the decayed state that meets the first row of a chunk in the direction of the sweep.
    entering = torch.zeros(*a.shape[:2], b.shape[-1], c.shape[-1], dtype=torch.float64, device=a.device)
    starts = range(0, n, chunk)
    for start in reversed(starts) if reverse else starts:
        rows = slice(start, min(start + chunk, n))
        ac, bc, cc = a[:, :, rows].double(), b[:, :, rows].double(), c[:, :, rows].double()
        m = ac.shape[2]
        ages = (m - 1 - r[:m] if reverse else r[:m])[:, None]  # rows since the sweep entered the chunk
        out[:, :, rows] = (ac @ bc.mT * mask[:, :, :m, :m]) @ cc + torch.exp(-s * ages) * (ac @ entering)
        entering = torch.exp(-s * m) * entering + (bc * torch.exp(-s * (m - ages))).mT @ cc
    return out


def exact(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """out, and with grad_out also dq, dk, dv, in float64, of ``[B, H, N, D]`` inputs."""
    result = {"out": _sweep(q, k, v, slope, False)}
    if grad_out is not None:
        result["dq"] = _sweep(grad_out, v, k, slope, False)
        result["dk"] = _sweep(v, grad_out, q, slope, True)
        result["dv"] = _sweep(k, q, grad_out, slope, True)
    return result


def _head_groups(x: Tensor) -> list[slice]:
    per_head = x.shape[0] * x.shape[2] * x.shape[3]
    step = max(1, _ELEMENTS // max(per_head, 1))
    return [slice(h, h + step) for h in range(0, x.shape[1], step)]


def derived_bounds(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, grad_out: Tensor | None, margin: float, length: int = 1024
) -> dict[str, float]:
    """``margin`` times the error of plain PyTorch in this dtype, plus one rounding; taken on the first tokens."""
    inputs = {"q": q[:1, :, :length], "k": k[:1, :, :length], "v": v[:1, :, :length]}
    heads, d, e = q.shape[1], q.shape[-1], v.shape[-1]
    acc = testing.accumulation_dtype(q.dtype)
    state = torch.zeros(1, heads, d, e, dtype=acc, device=q.device)
    want = exact(*inputs.values(), slope, None if grad_out is None else grad_out[:1, :, :length])
    plain = []
    for chunk in testing.CHUNKS:
        if grad_out is None:
            plain.append({"out": testing.chunked(*inputs.values(), slope.to(acc), chunk=chunk)[0]})
            continue
        got = testing.gradients(
            lambda q, k, v, _, *, chunk=chunk, **kw: testing.chunked(q, k, v, slope.to(acc), chunk=chunk, **kw),
            inputs,
            grad_out[:1, :, :length],
            state,
        )
        plain.append({name: got[name] for name in want})
    return {name: bound.l2 for name, bound in testing.bounds(want, plain, margin).items()}


def check(
    results: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    grad_out: Tensor | None = None,
    margin: float = testing.MARGIN,
) -> Verdict:
    """Judges ``out`` and, where given, ``dq dk dv``. All tensors ``[B, H, N, ...]``."""
    names = [n for n in ("out", "dq", "dk", "dv") if n in results]
    needed = grad_out if set(names) - {"out"} else None
    limits = derived_bounds(q, k, v, slope, needed, margin)
    difference, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for heads in _head_groups(v):
        part = (None if needed is None else needed[:, heads],)
        want = exact(q[:, heads], k[:, heads], v[:, heads], slope[heads], *part)
        for name in names:
            got = results[name][:, heads]
            if got.shape != want[name].shape:
                raise ValueError(f"gate: {name} has shape {tuple(got.shape)}, expected {tuple(want[name].shape)}")
            difference[name] += (got.double() - want[name]).square().sum().item()
            size[name] += want[name].square().sum().item()
    errors = {n: (difference[n] / (size[n] or 1.0)) ** 0.5 for n in names}
    return Verdict(errors, {n: limits[n] for n in names})


def check_ends(results: dict[str, Tensor], inputs: list[Tensor], slope: Tensor, margin: float = testing.MARGIN):
    """``check`` of the first batch row's first and last head alone; inputs are q, k, v and grad_out."""
    ends = [0, -1] if slope.numel() > 1 else [0]
    q, k, v, grad_out = (x[:1, ends] for x in inputs)
    return check({n: x[:1, ends] for n, x in results.items()}, q, k, v, slope[ends], grad_out, margin)


def _sampled_rows(n: int) -> list[int]:
    return sorted({i for i in (0, 1, 63, 64, 127, 128, n // 3, n // 2, n - 2, n - 1) if 0 <= i < n})


def check_softmax(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    """Causal softmax attention on sampled rows: enough to see that the peer computed what it is timed for."""
    rows = _sampled_rows(q.shape[2])
    difference = size = 0.0
    for i in rows:
        scores = (k[:, :, : i + 1].double() @ q[:, :, i, :, None].double())[..., 0] * q.shape[-1] ** -0.5
        want = (torch.softmax(scores, -1)[..., None, :] @ v[:, :, : i + 1].double())[..., 0, :]
        difference += (out[:, :, i].double() - want).square().sum().item()
        size += want.square().sum().item()
    # Probabilities are rounded to the dtype before the second product and the result once more; sums are float32.
    roundoff = torch.finfo(q.dtype).eps / 2
    bound = PEER_MARGIN * roundoff + 16 * torch.finfo(torch.float32).eps
    return Verdict({"out": (difference / (size or 1.0)) ** 0.5}, {"out": bound})
