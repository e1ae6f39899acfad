"""``python -m lightning_attn2_ext check``: does this installation compute the right thing on this machine?

Every device, every dtype: forward, gradients, states, packed sequences, decode and torch.compile, against the float64
recurrence of ``testing.py``. A bound in the table is 1.5 times the error of the same maths in plain PyTorch in that
dtype plus one rounding (``testing.bounds``); "same bits" means that two ways to compute must agree to the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from . import info, testing
from .bench import report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
#: From none at all to one whose powers underflow within a token; between them what models use.
SLOPES = (0.0, 0.004, 0.06, 0.5, 2.0, 50.0)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table: the tensor of a case that came closest to its bound."""

    device: str
    dtype: str
    case: str
    shown: str
    passed: bool


@dataclasses.dataclass
class Case:
    """Inputs of one comparison. Dense unless ``edges`` says where packed sequences begin and end."""

    b: int
    n: int
    d: int
    e: int
    token_major: bool = False
    edges: tuple[int, ...] | None = None
    scale: float = 1.0
    with_state: bool = True

    def make(self, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(self.n + self.d)
        acc = testing.accumulation_dtype(dtype)
        h, num_seqs = len(SLOPES), self.b if self.edges is None else len(self.edges) - 1

        def tokens(dim: int, silu: bool) -> Tensor:
            x = torch.randn(self.b, self.n, h, dim, generator=generator)
            x = (F.silu(x) if silu else x).to(device, dtype).transpose(1, 2)
            return x if self.token_major else x.contiguous()

        def state() -> Tensor:
            return torch.randn(num_seqs, h, self.d, self.e, generator=generator).to(device, acc)

        inputs = {"q": tokens(self.d, True), "k": tokens(self.d, True), "v": tokens(self.e, False)}
        inputs["slope"] = torch.tensor(SLOPES, dtype=acc, device=device)
        if self.with_state:
            inputs["initial_state"] = state()
        options: dict = {"scale": self.scale}
        if self.edges is not None:
            options["cu_seqlens"] = torch.tensor(self.edges, dtype=torch.int32, device=device)
        return inputs, tokens(self.e, False), state(), options


def _shown(errors: dict[str, testing.Error], bounds: dict[str, testing.Bound]) -> tuple[str, bool]:
    """The tensor that is nearest to its bound (or furthest beyond), in words, and whether all are within."""
    worst, text = -1.0, ""
    for name, error in errors.items():
        for kind in ("l2", "max"):
            got, bound = getattr(error, kind), getattr(bounds[name], kind)
            share = got / bound if bound else math.inf if got else 0.0
            share = math.inf if math.isnan(share) else share
            if share > worst:
                worst, text = share, f"{name} {kind} {got:.1e} <= {bound:.1e}"
    return text, all(errors[name].within(bounds[name]) for name in errors)


def _compare(case: Case, dtype: torch.dtype, device: torch.device, gradients: bool) -> tuple[str, bool]:
    inputs, grad_out, grad_state, options = case.make(dtype, device)
    want = testing.truth(inputs, grad_out, grad_state, **options)
    plain = [
        testing.gradients(testing.chunked, inputs, grad_out, grad_state, chunk=chunk, **options)
        for chunk in testing.CHUNKS
    ]
    if gradients:
        got = testing.gradients(torch.ops.la2.forward_with_state, inputs, grad_out, grad_state, **options)
    else:
        call = [inputs[n] for n in ("q", "k", "v", "slope")]
        with torch.inference_mode():
            out = torch.ops.la2.forward(*call, initial_state=inputs.get("initial_state"), **options)
            _, final = torch.ops.la2.forward_with_state(*call, initial_state=inputs.get("initial_state"), **options)
        got = {"out": out, "final_state": final}
    terms = testing.slope_terms(inputs, want, grad_state, options.get("cu_seqlens"))
    bounds = testing.bounds(want, plain, slope_terms=terms)
    return _shown({n: testing.error(got[n], want[n]) for n in got}, bounds)


def _decode(dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    """Token after token from a state must give what the recurrence gives."""
    case = Case(2, 40, 64, 64)
    inputs, grad_out, grad_state, _ = case.make(dtype, device)
    q, k, v, slope, state = (inputs[n] for n in ("q", "k", "v", "slope", "initial_state"))
    exact = testing.recurrence(q, k, v, slope, initial_state=state)
    want = dict(zip(("out", "final_state"), exact, strict=True))
    plain = [
        dict(zip(("out", "final_state"), testing.chunked(q, k, v, slope, initial_state=state, chunk=c), strict=True))
        for c in testing.CHUNKS
    ]
    with torch.inference_mode():
        out, final = testing.decode_steps(q, k, v, state, slope)
    got = {"out": out, "final_state": final}
    return _shown({n: testing.error(got[n], want[n]) for n in got}, testing.bounds(want, plain))


def _slots(dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    """Rows with a negative index are padding: their output is zero, and no state but those indexed changes."""
    inputs, *_ = Case(3, 1, 64, 64).make(dtype, device)
    q, k, v = (inputs[n][:, :, 0] for n in ("q", "k", "v"))
    pool = torch.randn(5, len(SLOPES), 64, 64, dtype=testing.accumulation_dtype(dtype), device=device)
    before = pool.clone()
    indices = torch.tensor([3, -1, 0], dtype=torch.int32, device=device)
    with torch.inference_mode():
        out = torch.ops.la2.decode(q, k, v, pool, inputs["slope"], state_indices=indices)
        alone = before[[3, 0]].clone()
        want = torch.ops.la2.decode(q[[0, 2]], k[[0, 2]], v[[0, 2]], alone, inputs["slope"])
    passed = (
        not out[1].any()
        and torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])
        and torch.equal(pool[[3, 0]], alone)
        and torch.equal(out[[0, 2]], want)
    )
    return "same bits, padding zero, other slots untouched", bool(passed)


def _split(dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    """A sequence in three pieces, the state handed on, must stay within the bound of the whole."""
    case = Case(2, 230, 64, 64)
    inputs, *_ = case.make(dtype, device)
    q, k, v, slope, state = (inputs[n] for n in ("q", "k", "v", "slope", "initial_state"))
    exact = testing.recurrence(q, k, v, slope, initial_state=state)
    want = dict(zip(("out", "final_state"), exact, strict=True))
    plain = [
        dict(zip(("out", "final_state"), testing.chunked(q, k, v, slope, initial_state=state, chunk=c), strict=True))
        for c in testing.CHUNKS
    ]
    outs = []
    with torch.inference_mode():
        for a, b in ((0, 1), (1, 101), (101, 230)):
            out, state = torch.ops.la2.forward_with_state(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], slope, initial_state=state
            )
            outs.append(out)
    got = {"out": torch.cat(outs, 2), "final_state": state}
    return _shown({n: testing.error(got[n], want[n]) for n in got}, testing.bounds(want, plain))


def _twice(dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    """The same call again gives the same bits, gradients included."""
    inputs, grad_out, grad_state, options = Case(2, 300, 64, 64).make(dtype, device)
    first, second = (
        testing.gradients(torch.ops.la2.forward_with_state, inputs, grad_out, grad_state, **options) for _ in range(2)
    )
    return "same bits", all(torch.equal(first[n], second[n]) for n in first)


def _compiled(dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    """Captured as one graph, forward and backward, at two lengths, with the very results of the eager call.

    The ``aot_eager`` backend captures as inductor does but needs no C++ compiler.
    """

    def model(q, k, v, slope, initial_state=None):
        return torch.ops.la2.forward_with_state(q, k, v, slope, initial_state=initial_state)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    passed = True
    for n in (70, 131):
        inputs, grad_out, grad_state, _ = Case(2, n, 64, 64).make(dtype, device)
        eager = testing.gradients(model, inputs, grad_out, grad_state)
        graph = testing.gradients(compiled, inputs, grad_out, grad_state)
        passed = passed and all(torch.equal(eager[name], graph[name]) for name in eager)
    return "same bits, one graph", passed


def _checks():
    def compare(case: Case, gradients: bool):
        return lambda dtype, device: _compare(case, dtype, device, gradients)

    yield "forward, ragged length", compare(Case(2, 203, 64, 64, scale=0.125), False)
    yield "forward, no state, [B, N, H, D]", compare(Case(2, 130, 128, 128, token_major=True, with_state=False), False)
    yield "gradients", compare(Case(2, 203, 64, 64), True)
    yield "gradients, D 40, E 24, [B, N, H, D]", compare(Case(1, 150, 40, 24, token_major=True), True)
    yield "gradients, packed, one empty", compare(Case(1, 218, 64, 64, edges=(0, 1, 1, 90, 218)), True)
    yield "split in three, state handed on", _split
    yield "decode, 40 steps", _decode
    yield "decode, slots and padding", _slots
    yield "run twice", _twice
    yield "torch.compile", _compiled


def run(devices: list[torch.device], dtypes: list[str], on_line=None) -> list[Line]:
    """All checks; a check that raises has failed."""
    lines = []
    for device in devices:
        for name in dtypes:
            for case, check in _checks():
                try:
                    shown, passed = check(DTYPES[name], device)
                except Exception as error:
                    shown, passed = f"{type(error).__name__}: {error}".strip().splitlines()[0][:150], False
                line = Line(str(device), name, case, shown, passed)
                lines.append(line)
                if on_line is not None:
                    on_line(line)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_attn2_ext check", description="Tests this installation on every device and dtype."
    )
    parser.add_argument("--device", action="append", help="only this one; may be given several times")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="likewise")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    devices = [torch.device(d) for d in arguments.device] if arguments.device else info.devices()
    print(f"lightning_attn2_ext {info.version()}, torch {torch.__version__}, CUDA kernels: {info.cuda_status()}")
    if not arguments.device and len(devices) > 1 and info.cuda_status() != "loaded":
        print(f"not tested: {', '.join(map(str, devices[1:]))}")
        devices = devices[:1]
    terminal = sys.stdout.isatty()

    def follow(line: Line) -> None:
        if terminal:
            print(f"\r\033[K{line.device} {line.dtype} {line.case}", end="", flush=True)

    lines = run(devices, arguments.dtype or list(DTYPES), follow)
    if terminal:
        print("\r\033[K", end="")
    rows = [[x.device, x.dtype, x.case, x.shown, "ok" if x.passed else "FAILED"] for x in lines]
    print(report.table(["device", "dtype", "check", "nearest to its bound", ""], rows, texts=5))
    failed = sum(not x.passed for x in lines)
    print(f"{len(lines) - failed} of {len(lines)} checks passed in {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0
