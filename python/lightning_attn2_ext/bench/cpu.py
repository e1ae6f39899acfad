"""``bench cpu``: forward, forward + backward and decode of this package beside torch's softmax attention, float32."""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from .. import slopes, testing
from . import gate, report, timing

HEADS, HEAD_DIM = 8, 64
LENGTHS = (4096, 32768, 131072)
SOFTMAX_UP_TO = 32768  # its time grows with the square: 131072 would take 16 times as long again
POSITIONS = (1024, 32768, 131072)
OURS, SOFTMAX = "la2", "softmax (torch SDPA)"


def _inputs(length: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(1, HEADS, length, HEAD_DIM, generator=generator)

    q, k, v, grad_out = normal(), normal(), normal(), normal()
    return F.silu(q, inplace=True), F.silu(k, inplace=True), v, grad_out


def _softmax(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _with_backward(function, inputs):
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = function(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3]))


def _judge(name: str, function, inputs, slope, backward: bool) -> gate.Verdict:
    q, k, v, grad_out = inputs
    if backward:
        results = dict(zip(("out", "dq", "dk", "dv"), _with_backward(function, inputs), strict=True))
    else:
        with torch.inference_mode():
            results = {"out": function(q, k, v)}
    if name == OURS:
        return gate.check(results, q, k, v, slope, grad_out)
    return gate.check_softmax(results["out"], q, k, v)


def _row(results, kind, name, length, seconds, verdict, **more):
    results.append(
        {
            "what": kind,
            "op": name,
            "n": length,
            "ms": seconds * 1e3 if verdict.passed else None,
            "tokens_per_s": length / seconds if verdict.passed and kind != "decode" else None,
            "errors": verdict.errors,
            "bounds": verdict.bounds,
            "passed": verdict.passed,
            **more,
        }
    )


def sweep(lengths, softmax_up_to: int, repeats: int, operators=None) -> list[dict]:
    """Times over ``lengths``; ``operators`` replaces the functions that are timed (the tests pass a wrong one)."""
    slope = slopes.minimax(HEADS, 0, 12)
    operators = operators or {OURS: lambda q, k, v: torch.ops.la2.forward(q, k, v, slope), SOFTMAX: _softmax}
    results: list[dict] = []
    # The longest first: it makes the process as large as it will be, and memory that a virtual machine hands out for
    # the first time is slow to touch.
    for length in sorted(lengths, reverse=True):
        here = {n: f for n, f in operators.items() if n != SOFTMAX or length <= softmax_up_to}
        for kind in ("forward", "forward + backward"):
            backward = kind != "forward"
            checked = _inputs(length, seed=10_000 + length)
            verdicts = {n: _judge(n, f, checked, slope, backward) for n, f in here.items()}
            del checked
            for name, verdict in verdicts.items():
                if not verdict.passed:
                    print(f"WRONG RESULT, not timed: {name} {kind} N={length}: {verdict}")

            def call(function, inputs, backward=backward):
                if backward:
                    return _with_backward(function, inputs)
                with torch.inference_mode():
                    return function(*inputs[:3])

            calls = {n: lambda x, f=f: call(f, x) for n, f in here.items() if verdicts[n].passed}
            taken = timing.cpu_medians(calls, lambda i, n=length: _inputs(n, seed=i), repeats, warmup=2)
            for name in here:
                _row(results, kind, name, length, taken.get(name, float("nan")), verdicts[name], repeats=repeats)
    return results


def decode(positions, repeats: int) -> list[dict]:
    """One step of one sequence behind ``n`` tokens: a fixed-size state here, a cache of n keys and values there."""
    slope = slopes.minimax(HEADS, 0, 12)
    results: list[dict] = []
    for n in positions:
        _, k, v, _ = _inputs(n, seed=n)
        with torch.inference_mode():
            _, state = torch.ops.la2.forward_with_state(k, k, v, slope)
            steps = [[x[:, :, i] for x in _inputs(repeats + 2, seed=n + 1)[:3]] for i in range(repeats + 2)]
            q1, k1, v1 = (x.contiguous() for x in steps[0])
            before = state.clone()
            got = torch.ops.la2.decode(q1, k1, v1, state, slope)
            # The definition, summed over all tokens at once: the old ones have aged by n - j, the new one by nothing.
            aged = torch.exp(-slope.double()[:, None] * torch.arange(n, 0, -1, dtype=torch.float64))
            weights = torch.einsum("bhd,bhnd->bhn", q1.double(), k.double()) * aged
            own = (q1.double() * k1.double()).sum(-1, keepdim=True) * v1.double()
            want = {"out": torch.einsum("bhn,bhne->bhe", weights, v.double()) + own}
            decay = torch.exp(-slope)[:, None, None]
            plain = (q1[..., None, :] @ (decay * before + k1[..., None] * v1[..., None, :]))[..., 0, :]
            bound = testing.bounds(want, [{"out": plain}])["out"].l2
            verdict = gate.Verdict({"out": testing.error(got, want["out"]).l2}, {"out": bound})
            cache_q = [s[0][:, :, None] for s in steps]
            calls = {
                OURS: lambda i, s=steps: torch.ops.la2.decode(*s[i], state, slope),  # noqa: B023 - called in this turn
                SOFTMAX: lambda i, q=cache_q, k=k, v=v: F.scaled_dot_product_attention(q[i], k, v),
            }
            # One after the other, not in turns: reading a long cache would push the state out of the processor's.
            taken = {n: timing.cpu_medians({n: c}, lambda i: i, repeats, warmup=2)[n] for n, c in calls.items()}
        _row(results, "decode", OURS, n, taken[OURS], verdict, repeats=repeats)
        row = cache_q[0]
        want_row = F.scaled_dot_product_attention(row.double(), k.double(), v.double())
        got_row = F.scaled_dot_product_attention(row, k, v)
        error, limit = testing.error(got_row, want_row).l2, 64 * torch.finfo(torch.float32).eps
        verdict = gate.Verdict({"out": error}, {"out": limit})
        _row(results, "decode", SOFTMAX, n, taken[SOFTMAX], verdict, repeats=repeats)
    return results


def tables(results: list[dict]) -> str:
    parts = []
    for kind in ("forward", "forward + backward"):
        rows = []
        for n in sorted({r["n"] for r in results if r["what"] == kind}):
            by_op = {r["op"]: r for r in results if r["what"] == kind and r["n"] == n}
            cells = [f"{kind}, N = {n}"]
            for op in (OURS, SOFTMAX):
                r = by_op.get(op)
                if r is None:
                    cells += ["not run", "-"]
                elif not r["passed"]:
                    cells += ["WRONG", "-"]
                else:
                    cells += [f"{r['ms']:.1f}", f"{r['tokens_per_s']:,.0f}"]
            timed = [by_op[op]["ms"] for op in (OURS, SOFTMAX) if op in by_op and by_op[op]["passed"]]
            cells.append(f"{timed[1] / timed[0]:.1f}x" if len(timed) == 2 else "-")
            if OURS in by_op:
                cells.append(f"{max(by_op[OURS]['errors'].values()):.1e}")
            else:
                cells.append("-")
            rows.append(cells)
        if rows:
            parts.append(report.table(["", "la2 ms", "tokens/s", "softmax ms", "tokens/s", "ratio", "la2 error"], rows))
    rows = []
    for n in sorted({r["n"] for r in results if r["what"] == "decode"}):
        by_op = {r["op"]: r for r in results if r["what"] == "decode" and r["n"] == n}
        shown = [f"{by_op[op]['ms'] * 1e3:.1f}" if by_op[op]["passed"] else "WRONG" for op in (OURS, SOFTMAX)]
        rows.append([f"decode step behind {n} tokens", *shown])
    if rows:
        parts.append(report.table(["", "la2 us", "softmax with a cache us"], rows))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_attn2_ext bench cpu", description=__doc__)
    parser.add_argument("--json", metavar="OUT", help="write the results there too")
    parser.add_argument("--threads", type=int, help="threads of torch (default: as torch has it)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of which the median is shown (default 5)")
    parser.add_argument("--quick", action="store_true", help="short sequences, a few seconds: to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = report.environment()
    facts["keeps_freed_memory"] = timing.keep_freed_memory()
    print(report.describe(facts))
    print(f"float32, B=1, H={HEADS}, D={HEAD_DIM}; medians of {arguments.repeats}, new inputs for every round")
    print(
        "freed memory is "
        + ("kept" if facts["keeps_freed_memory"] else "given back to the system")
        + " between calls\n"
    )
    lengths, positions = ((512, 1024), (512, 4096)) if arguments.quick else (LENGTHS, POSITIONS)
    results = sweep(lengths, SOFTMAX_UP_TO, arguments.repeats)
    results += decode(positions, 50 if arguments.quick else 200)
    print(tables(results))
    if arguments.json:
        report.write_json(arguments.json, "cpu", facts, results)
    return 0 if all(r["passed"] for r in results) else 1
