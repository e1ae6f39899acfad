"""(e) The longest sequence: in one call as far as the memory goes, then streamed through states at constant memory,
with a needle planted at the very start.

One call is held to float64 where the whole length shows: at its last tokens, which see all before them through the
state, and, in the backward, at its first ones, which see all behind them. One of the heads there does not decay at all.
In the stream no key but the needle's has a part along the needle's direction, so that at slope 0 its value must come
back to the bit; at slope 1 / length it comes back with the weight 1 / e that the formula gives it.
"""

from __future__ import annotations

import math
import pathlib

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import testing
from .. import machine, plots, report
from .run import Run

LETTER, TITLE = "e", "The longest sequence"
WINDOW = 64  # tokens whose results are compared with float64
PIECE = 1 << 16  # tokens of which float64 sums are taken at a time
FREE_SHARE = 0.92  # of the free memory
STEP = 1 << 14


def points(run: Run) -> list[dict]:
    streamed = {"what": "streamed", "tokens": 1 << 13 if run.quick else 1 << 24 if run.gpu else 1 << 20}
    return [
        {"what": "one call", "backward": False} | _heads(run),
        streamed | {"piece": 1 << 8 if run.quick else 1 << 17 if run.gpu else 1 << 14} | _heads(run),
        {"what": "one call", "backward": True} | _heads(run),
    ]


def _heads(run: Run) -> dict:
    return {"h": 3, "d": 16} if run.quick else {"h": 16, "d": 128} if run.gpu else {"h": 4, "d": 64}


def measure(run: Run, config: dict) -> dict:
    run.free_memory()
    with torch.no_grad():
        return streamed(run, config) if config["what"] == "streamed" else one_call(run, config)


def release() -> None:
    pass


# ---- one call


def one_call(run: Run, config: dict) -> dict:
    h, d, tensors = config["h"], config["d"], 7 if config["backward"] else 4
    if run.gpu and not run.quick:
        free = torch.cuda.mem_get_info(run.device)[0]
        n = int(FREE_SHARE * free / (tensors * h * d * run.dtype.itemsize)) // STEP * STEP
    else:
        n = 4096 if run.quick else 1 << 17
    while True:
        try:
            return _one_call(run, h, n, d, config["backward"])
        except torch.OutOfMemoryError:
            if n <= STEP:
                raise
        run.free_memory()  # only now is the error gone, and with it what its frames held
        n = int(0.94 * n) // STEP * STEP


def _one_call(run: Run, h: int, n: int, d: int, backward: bool) -> dict:
    generator = run.generator(0)

    def normal() -> Tensor:
        return torch.empty(1, h, n, d, dtype=run.dtype, device=run.device).normal_(generator=generator)

    q, k, v = F.silu(normal(), inplace=True), F.silu(normal(), inplace=True), normal()
    slope = torch.logspace(0, -8, h, base=2, device=run.device)
    slope[-1] = 0
    results = {}
    if backward:
        grad_out = normal()
        call = lambda: torch.ops.la2.backward(grad_out, None, q, k, v, slope, need_dslope=False)[:3]  # noqa: E731
        first = call()
        results |= _edges(dict(zip(("dq", "dk", "dv"), first, strict=True)))
    else:
        grad_out = None
        call = lambda: torch.ops.la2.forward(q, k, v, slope)  # noqa: E731
        first = call()
        results |= _edges({"out": first})
    del first
    errors, bounds = _held_to_float64(results, q, k, v, slope, grad_out)
    passed = all(errors[x] <= bounds[x] for x in errors)
    row = {"n": n, "passed": passed, "errors": errors, "bounds": bounds}
    if passed:
        row["ms"] = run.seconds(call) * 1e3
        row["tokens_per_s"] = n / row["ms"] * 1e3
        row["bytes_of_tensors"] = (7 if backward else 4) * h * n * d * run.dtype.itemsize
        if run.gpu:
            row["memory_bytes"] = torch.cuda.get_device_properties(run.device).total_memory
    return row


def _edges(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first and the last rows of the steepest, a middle and the flattest head."""
    heads = _heads_to_look_at(next(iter(results.values())).shape[1])
    edges = {}
    for name, x in results.items():
        edges[f"{name}, first rows"], edges[f"{name}, last rows"] = x[:, heads, :WINDOW], x[:, heads, -WINDOW:]
    return {name: x.clone() for name, x in edges.items()}


def _heads_to_look_at(h: int) -> list[int]:
    return sorted({0, h // 2, h - 1})


def far_state(a: Tensor, b: Tensor, slope: Tensor, heads: list[int], first: int, last: int, reverse=False) -> Tensor:
    """``sum of exp(-s age) a_t b_t^T`` over rows first..last - 1 of some heads, in float64, piece by piece; age counts
    from the last of the rows (reverse: from the first). ``slope`` is that of these heads."""
    total = torch.zeros(a.shape[0], len(heads), a.shape[3], b.shape[3], dtype=torch.float64, device=a.device)
    for start in range(first, last, PIECE):
        t = torch.arange(start, min(start + PIECE, last), device=a.device, dtype=torch.float64)
        weights = torch.exp(-slope.double()[:, None] * (t - first if reverse else last - 1 - t))[None, :, :, None]
        rows = slice(start, min(start + PIECE, last))
        total += (weights * a[:, heads, rows].double()).mT @ b[:, heads, rows].double()
    return total


def _held_to_float64(results, q, k, v, slope, grad_out) -> tuple[dict, dict]:
    """Errors and bounds of the edges of a call. What is beyond a window enters it as a state, summed in float64; the
    bound adds what a float32 state may have gathered in a sum over all chunks: independent roundings, 4 sigma."""
    heads, n = _heads_to_look_at(q.shape[1]), q.shape[2]
    slope = slope[heads]
    acc = testing.accumulation_dtype(q.dtype)
    gathered = 4 * math.sqrt(n / 64) * torch.finfo(acc).eps / 2
    errors, bounds = {}, {}
    zero = torch.zeros(1, len(heads), q.shape[3], v.shape[3], dtype=torch.float64, device=q.device)
    for edge, rows in (("first rows", slice(0, WINDOW)), ("last rows", slice(n - WINDOW, n))):
        inputs = {name: x[:, heads, rows] for name, x in (("q", q), ("k", k), ("v", v))} | {"slope": slope.double()}
        is_last = edge == "last rows"
        inputs["initial_state"] = far_state(k, v, slope, heads, 0, n - WINDOW) if is_last else zero
        if grad_out is None:
            want = {
                "out": testing.recurrence(
                    *(inputs[x] for x in ("q", "k", "v", "slope")), initial_state=inputs["initial_state"]
                )[0]
            }
            plain = []
            for chunk in testing.CHUNKS:
                given = [inputs[x] for x in ("q", "k", "v")], slope.to(acc), inputs["initial_state"].to(acc)
                plain.append({"out": testing.chunked(*given[0], given[1], initial_state=given[2], chunk=chunk)[0]})
        else:
            # The final state's gradient: what the tokens behind the window pass back, one more step old.
            final = zero
            if not is_last:
                behind = far_state(q, grad_out, slope, heads, WINDOW, n, reverse=True)
                final = torch.exp(-slope.double())[:, None, None] * behind
            own = grad_out[:, heads, rows]
            with torch.enable_grad():
                want = testing.truth(inputs, own, final)
                narrow = inputs | {"slope": slope.to(acc), "initial_state": inputs["initial_state"].to(acc)}
                plain = [testing.gradients(testing.chunked, narrow, own, final, chunk=c) for c in testing.CHUNKS]
            want = {name: want[name] for name in ("dq", "dk", "dv")}
        for name, bound in testing.bounds(want, plain).items():
            key = f"{name}, {edge}"
            errors[key], bounds[key] = testing.error(results[key], want[name]).l2, bound.l2 + gathered
    return errors, bounds


# ---- streamed


def streamed(run: Run, config: dict) -> dict:
    h, d, tokens, piece = (config[x] for x in ("h", "d", "tokens", "piece"))
    q, k, v, _ = machine.qkv(1, h, piece, d, run.dtype, run.device, seed=1)
    k[..., 0] = 0  # the needle's direction
    slope = torch.linspace(0.2, 1, h, device=run.device)
    slope[0], slope[1] = 0, 1 / tokens
    needle = torch.randn(1, h, d, generator=run.generator(2), device=run.device).to(run.dtype)
    look = torch.zeros(1, h, d, dtype=run.dtype, device=run.device)
    look[..., 0] = 1
    nothing = torch.zeros_like(look)

    first = k.clone(), v.clone()
    first[0][:, :, 0], first[1][:, :, 0] = look, needle
    state = torch.zeros(1, h, d, d, dtype=testing.accumulation_dtype(run.dtype), device=run.device)
    rates, held, found = [], [], True
    if run.gpu:
        torch.cuda.reset_peak_memory_stats(run.device)  # what making the inputs took would hide what the stream takes
    for i in range(tokens // piece):
        keys, values = (k, v) if i else first

        def call(keys=keys, values=values, state=state):
            return torch.ops.la2.forward_with_state(q, keys, values, slope, initial_state=state)

        if i in (0, 1, tokens // piece - 1):
            out, state = call()  # the first time of a shape, and memory that is given out for the first time
            rates.append(piece / run.seconds(call))
            held.append(_held(run))
        else:
            out, state = call()
        del out
        if i & (i - 1) == 0 or i == tokens // piece - 1:  # does it still know? One step with neither key nor value
            back = torch.ops.la2.decode(look, nothing, nothing, state.clone(), slope)
            found = found and torch.equal(back[:, 0], needle[:, 0])
    # slope 1 / tokens: the age of the needle is tokens; the decay of each chunk and its product are rounded.
    want = math.exp(-1.0) * needle[:, 1].double()
    faded = testing.error(back[:, 1], want).l2
    eps = torch.finfo(state.dtype).eps
    fade_bound = tokens / 64 * 2 * eps + torch.finfo(run.dtype).eps / 2
    # The other heads have forgotten all but the last tokens.
    last = min(piece, 512)
    rows = [x[:, 2:, -last:] for x in (q, k, v)]
    exact = {"state": far_state(*rows[1:], slope[2:], list(range(h - 2)), 0, last)}
    plain = [{"state": testing.chunked(*rows, slope[2:].to(state.dtype), chunk=c)[1]} for c in testing.CHUNKS]
    error, bound = testing.error(state[:, 2:], exact["state"]).l2, testing.bounds(exact, plain)["state"].l2
    return {
        "passed": bool(found) and faded <= fade_bound and error <= bound and held[-1] <= held[1] + _slack(run),
        "needle_returned_to_the_bit": bool(found),
        "errors": {"needle at slope 1/length": faded, "state of other heads": error},
        "bounds": {"needle at slope 1/length": fade_bound, "state of other heads": bound},
        "first_tokens_per_s": rates[1],
        "last_tokens_per_s": rates[-1],
        "held_bytes_early": held[1],
        "held_bytes_late": held[-1],
        "state_bytes": state.numel() * state.element_size(),
    }


def _held(run: Run) -> int:
    """Bytes that this process holds: on a GPU the most so far, on a CPU now."""
    if run.gpu:
        return torch.cuda.max_memory_allocated(run.device)
    import os

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _slack(run: Run) -> int:
    """A CPU process's pages also move for other reasons; less than one piece of results of a real run."""
    return 0 if run.gpu else 32 << 20


# ---- for people


def summary(rows: list[dict]) -> str | None:
    parts = []
    for r in rows:
        if not r["passed"] or r.get("skipped"):
            continue
        if r["what"] == "one call":
            parts.append(f"{'forward and backward' if r['backward'] else 'forward'} in one call: {r['n']:,}")
        else:
            parts.append(f"streamed: {r['tokens']:,}, needle returned to the bit")
    return "; ".join(sorted(parts)) or None


def section(rows: list[dict]) -> str:
    lines, text = [], [" ".join(__doc__.split("\n\n", 1)[1].split())]
    for r in (r for r in rows if r["what"] == "one call"):
        name = "backward" if r["backward"] else "forward"
        if not r.get("ms"):
            lines.append([name, r.get("skipped") or r.get("failed") or "WRONG RESULT", *"----"])
            continue
        gib = f"{r['bytes_of_tensors'] / 2**30:.1f}" + (
            f" of {r['memory_bytes'] / 2**30:.0f}" if "memory_bytes" in r else ""
        )
        worst = max(r["errors"], key=lambda x: r["errors"][x] / r["bounds"][x])
        verdict = f"{r['errors'][worst]:.1e} (bound {r['bounds'][worst]:.1e}, {worst})"
        lines.append([name, f"{r['n']:,}", f"{r['ms']:.1f}", f"{r['tokens_per_s'] / 1e6:.2f}", gib, verdict])
    if lines:
        text.append(report.table(["one call", "tokens", "ms", "Mtok/s", "GiB of tensors", "error"], lines, texts=1))
    for r in (r for r in rows if r["what"] == "streamed"):
        if "state_bytes" not in r:
            text.append(f"Streamed: {r.get('skipped') or r.get('failed')}.")
            continue
        came = "came back to the bit at every doubling" if r["needle_returned_to_the_bit"] else "was LOST"
        text.append(
            f"Streamed: {r['tokens']:,} tokens in pieces of {r['piece']:,} through states of "
            f"{r['state_bytes'] / 2**20:.2f} MiB. At slope 0 the needle {came}; at slope 1 / length it came back as "
            f"1 / e of "
            f"itself with a relative error of {r['errors']['needle at slope 1/length']:.1e}. Memory held after two "
            f"pieces "
            f"{machine.megabytes(r['held_bytes_early'])} MiB, after the last "
            f"{machine.megabytes(r['held_bytes_late'])} MiB; "
            f"{r['first_tokens_per_s'] / 1e6:.2f} M tokens/s in the second piece, "
            f"{r['last_tokens_per_s'] / 1e6:.2f} M in the last."
        )
    return "\n\n".join(text)


def draw(folder: pathlib.Path, rows: list[dict], caption: str) -> list[pathlib.Path]:
    for r in rows:
        if r["what"] == "streamed" and r.get("last_tokens_per_s"):
            rates = [(2 * r["piece"], r["first_tokens_per_s"]), (r["tokens"], r["last_tokens_per_s"])]
            path = folder / "e_streamed.png"
            title = "streamed through states"
            plots.lines(path, {"la2": rates}, title=title, x="tokens read", y="tokens/s", caption=caption, log_y=False)
            return [path]
    return []
