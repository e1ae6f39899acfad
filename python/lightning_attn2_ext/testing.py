"""What a result of this package is compared with, and how far off it may be.

- :func:`recurrence` is the definition itself, one token at a time, in float64 and differentiable: the truth.
- :func:`chunked` is the maths of the kernels in plain PyTorch: the same chunks, operands of every product rounded to
  the dtype of the inputs, sums in the accumulation dtype. Its error against the truth is what the dtype costs anybody.
- :func:`bounds` makes tolerances of that: 1.5 times the error of :func:`chunked`, worst over several chunk lengths,
  plus one rounding of the result. None of them is chosen by hand.

Names as everywhere in this package: B batch, H heads, N length, D key dim, E value dim, S state ``[D, E]``, s slope.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

import torch
from torch import Tensor

__all__ = [
    "Bound",
    "Error",
    "accumulation_dtype",
    "bounds",
    "chunked",
    "decode_steps",
    "error",
    "gradients",
    "recurrence",
    "slope_terms",
    "truth",
]

#: Chunk lengths over which bounds take the worst case: those that kernels use, and 1, which is the order of sums of a
#: kernel that adds row after row into its state (in float32 that costs four times what summing chunks first does).
CHUNKS = (1, 16, 32, 64, 128)

#: A kernel may be this much further off than plain PyTorch in the same dtype.
MARGIN = 1.5


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, states and slopes: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """(batch rows, token range) of each stretch that has a state of its own; dense batches are one stretch."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))]
    edges = cu_seqlens.tolist()
    return [(slice(i, i + 1), slice(a, b)) for i, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))]


def _over_sequences(one, q, k, v, slope, initial_state, cu_seqlens, dtype):
    """Runs ``one(q, k, v, slope [n, H], state [n, H, D, E])`` per stretch and puts the results together."""
    num_seqs = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    heads, d, e = q.shape[1], q.shape[-1], v.shape[-1]
    if slope is None:
        slope = torch.zeros(heads, dtype=dtype, device=q.device)
    slope = slope.to(dtype).expand(num_seqs, heads)
    if initial_state is None:
        initial_state = torch.zeros(num_seqs, heads, d, e, dtype=dtype, device=q.device)
    state = initial_state.to(dtype)
    outs, states = [], []
    for rows, tokens in _sequences(q, cu_seqlens):
        out, last = one(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], slope[rows], state[rows])
        outs.append(out)
        states.append(last)
    return torch.cat(outs, 2), torch.cat(states, 0)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Output and final state by the recurrence, token by token, in float64.

    ``S_t = exp(-s) S_{t-1} + k_t v_t^T`` and ``o_t = scale q_t^T S_t``. Differentiable with respect to every tensor.
    """

    def one(q, k, v, slope, state):
        q, k, v = q.double(), k.double(), v.double()
        decay = torch.exp(-slope)[..., None, None]
        rows = []
        for t in range(q.shape[2]):
            state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            rows.append(scale * torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        out = torch.stack(rows, 2) if rows else v.new_zeros(v.shape)
        return out, state

    return _over_sequences(one, q, k, v, slope, initial_state, cu_seqlens, torch.float64)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same by chunks in plain PyTorch, with the roundings of a kernel that feeds a matrix unit.

    Operands of products are rounded to ``q.dtype``, and so are their gradients on the way back; sums, states and decay
    factors are kept in the accumulation dtype.
    """
    dtype, acc = q.dtype, accumulation_dtype(q.dtype)

    def rounded(x):
        return x.to(dtype).to(acc)

    def one(q, k, v, slope, state):
        q, k, v = q.to(acc), k.to(acc), v.to(acc)
        outs = []
        for start in range(0, q.shape[2], chunk):
            qc, kc, vc = (x[:, :, start : start + chunk] for x in (q, k, v))
            c = qc.shape[2]
            r = torch.arange(1, c + 1, device=q.device, dtype=acc)
            gap = r[:, None] - r[None, :]
            mask = torch.where(gap >= 0, torch.exp(-slope[..., None, None] * gap.clamp(min=0)), 0)  # M [n, H, C, C]
            lead = torch.exp(-slope[..., None] * r)[..., None]  # lambda^r [n, H, C, 1]
            tail = torch.exp(-slope[..., None] * (c - r))[..., None]  # lambda^(C - r)
            intra = rounded(qc @ kc.mT * mask) @ vc
            inter = lead * (qc @ rounded(state))
            outs.append(scale * (intra + inter))
            state = torch.exp(-slope * c)[..., None, None] * state + rounded(tail * kc).mT @ vc
        out = torch.cat(outs, 2) if outs else v.new_zeros(v.shape)
        return out.to(dtype), state

    return _over_sequences(one, q, k, v, slope, initial_state, cu_seqlens, acc)


def decode_steps(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor | None = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``torch.ops.la2.decode`` over every token of q, k, v ``[B, H, N, ...]``; the state that is passed in stays."""
    state = state.clone()
    rows = [
        torch.ops.la2.decode(q[:, :, t], k[:, :, t], v[:, :, t], state, slope, scale=scale) for t in range(q.shape[2])
    ]
    return torch.stack(rows, 2), state


def gradients(function, inputs: dict[str, Tensor], grad_out: Tensor, grad_final_state: Tensor, **options):
    """Values and gradients of ``function(q, k, v, slope, initial_state=...) -> (out, final_state)``.

    ``inputs`` maps ``q k v`` and, when used, ``slope initial_state`` to tensors. The result has ``out final_state`` and
    ``dq dk dv dslope dinitial_state``, each in the dtype that the function gives it.
    """
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    positional = [leaves[n] for n in ("q", "k", "v")] + [leaves.get("slope")]
    out, final = function(*positional, initial_state=leaves.get("initial_state"), **options)
    names = [n for n in ("q", "k", "v", "slope", "initial_state") if n in leaves]
    grads = torch.autograd.grad(
        (out, final), [leaves[n] for n in names], (grad_out.to(out.dtype), grad_final_state.to(final.dtype))
    )
    return {
        "out": out.detach(),
        "final_state": final.detach(),
        **{"d" + n: g for n, g in zip(names, grads, strict=True)},
    }


def truth(inputs: dict[str, Tensor], grad_out: Tensor, grad_final_state: Tensor, **options) -> dict[str, Tensor]:
    """:func:`gradients` of :func:`recurrence`, from the very values of ``inputs`` and with nothing rounded after."""
    exact = {name: x.double() for name, x in inputs.items()}
    return gradients(recurrence, exact, grad_out.double(), grad_final_state.double(), **options)


@dataclasses.dataclass(frozen=True)
class Error:
    """How far a tensor is from the truth: in norm, and its worst element against the largest of the truth."""

    l2: float
    max: float

    def within(self, bound: Bound) -> bool:
        return self.l2 <= bound.l2 and self.max <= bound.max  # False for NaN, as it must be


@dataclasses.dataclass(frozen=True)
class Bound:
    """The largest :class:`Error` that passes."""

    l2: float
    max: float


@contextlib.contextmanager
def forced_plan(plan: str):
    """LA2_PLAN is ``plan`` for a while."""
    before = os.environ.get("LA2_PLAN")
    os.environ["LA2_PLAN"] = plan
    try:
        yield
    finally:
        if before is None:
            del os.environ["LA2_PLAN"]
        else:
            os.environ["LA2_PLAN"] = before


def error(got: Tensor, want: Tensor) -> Error:
    """Relative error of ``got``; of an all-zero truth, the absolute one, which must then be exactly zero."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise ValueError(f"error: got has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if want.numel() == 0:
        return Error(0.0, 0.0)
    difference = got - want
    norm, peak = want.norm().item(), want.abs().max().item()
    return Error(difference.norm().item() / (norm or 1.0), difference.abs().max().item() / (peak or 1.0))


def slope_terms(
    inputs: dict[str, Tensor], exact: dict[str, Tensor], grad_final_state: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Sum of the magnitudes of the terms whose sum is dslope, in dslope's shape.

    ``dslope = -sum over t of X_t`` with ``X_t = <gradient of S_t, S_t> = X_{t+1} + q_t . dq_t - k_t . dk_t``. The terms
    cancel each other and their errors need not, so it is by the terms that an error of dslope is to be measured.
    """
    steps = (inputs["q"].double() * exact["dq"]).sum(-1) - (inputs["k"].double() * exact["dk"]).sum(-1)
    ends = (grad_final_state.double() * exact["final_state"]).sum((-1, -2))  # [num_seqs, H]
    rows = []
    for sequence, tokens in _sequences(inputs["q"], cu_seqlens):
        own = steps[:, :, tokens].flip(2).cumsum(2)
        rows.append((own + ends[sequence][..., None]).abs().sum(2))
    total = torch.cat(rows, 0)
    return total.sum(0) if inputs["slope"].ndim == 1 else total


def bounds(
    exact: dict[str, Tensor],
    plain: list[dict[str, Tensor]],
    margin: float = MARGIN,
    slope_terms: Tensor | None = None,
) -> dict[str, Bound]:
    """A :class:`Bound` per tensor of ``exact`` from the errors of several plain computations of the same.

    The floor is one rounding of the result, in the dtype that the plain result has. dslope is no more than a few
    numbers, in which a plain computation can be near the truth by luck: its floor is what each of its terms
    (:func:`slope_terms`), the product of a state and a state's gradient, inherits from the errors that those have.
    """
    result = {}
    for name, want in exact.items():
        errors = [error(other[name], want) for other in plain]
        floor = error(want * (1 + torch.finfo(plain[0][name].dtype).eps / 2), want)
        if name == "dslope" and slope_terms is not None:
            factors = [n for n in ("final_state", "dinitial_state") if n in exact]
            inherited = sum(max(error(other[n], exact[n]).l2 for other in plain) for n in factors)
            floor = error(want + slope_terms * inherited, want)
        result[name] = Bound(
            margin * max(e.l2 for e in errors) + floor.l2,
            margin * max(e.max for e in errors) + floor.max,
        )
    return result
