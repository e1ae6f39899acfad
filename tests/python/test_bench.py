"""The benchmarks: a wrong result gets no time, and what is written can be read back."""

import json

import pytest
import torch

from lightning_attn2_ext import slopes, testing
from lightning_attn2_ext.bench import cpu, gate, ops, peers, plots, report, timing


def problem(n=300, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = torch.randn(4, 2, 4, n, 32, generator=generator).to(dtype)
    return q, k, v, grad_out, slopes.minimax(4, 0, 6)


def right(q, k, v, grad_out, slope):
    values = testing.truth({"q": q, "k": k, "v": v, "slope": slope}, grad_out, torch.zeros(2, 4, 32, 32))
    return {n: values[n].to(q.dtype) for n in ("out", "dq", "dk", "dv")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_passes_the_truth(dtype):
    *x, slope = problem(dtype=dtype)
    assert gate.check(right(*x, slope), *x[:3], slope, x[3]).passed


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_gate_refuses_a_wrong_result(name):
    *x, slope = problem()
    results = right(*x, slope)
    results[name][:, :, 290] *= 1.01  # one row in 300
    verdict = gate.check(results, *x[:3], slope, x[3])
    assert not verdict.passed
    assert [n for n in results if verdict.errors[n] > verdict.bounds[n]] == [name]


def test_gate_refuses_nan_and_wrong_shapes():
    *x, slope = problem()
    results = {"out": right(*x, slope)["out"]}
    results["out"][0, 0, 0, 0] = torch.nan
    assert not gate.check(results, *x[:3], slope).passed
    with pytest.raises(ValueError, match="gate: out has shape"):
        gate.check({"out": results["out"][:, :, :-1]}, *x[:3], slope)


def test_gate_of_heads_in_groups(monkeypatch):
    *x, slope = problem()
    whole = gate.check(right(*x, slope), *x[:3], slope, x[3])
    monkeypatch.setattr(gate, "_ELEMENTS", 1)
    parts = gate.check(right(*x, slope), *x[:3], slope, x[3])
    assert parts.errors == pytest.approx(whole.errors)


def test_softmax_gate():
    q, k, v, *_ = problem()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert gate.check_softmax(out, q, k, v).passed
    assert not gate.check_softmax(torch.nn.functional.scaled_dot_product_attention(q, k, v), q, k, v).passed


def test_cpu_benchmark_shows_no_time_for_a_wrong_result(capsys):
    slope = slopes.minimax(cpu.HEADS, 0, 12)

    def off_by_one_decay(q, k, v):
        return testing.chunked(q, k, v, slope)[0] * 1.001

    operators = {cpu.OURS: off_by_one_decay, cpu.SOFTMAX: cpu._softmax}
    results = cpu.sweep((128,), 128, repeats=1, operators=operators)
    ours = [r for r in results if r["op"] == cpu.OURS]
    assert ours and all(not r["passed"] and r["ms"] is None and r["tokens_per_s"] is None for r in ours)
    assert all(r["passed"] and r["ms"] > 0 for r in results if r["op"] == cpu.SOFTMAX)
    assert "WRONG RESULT, not timed: la2 forward N=128" in capsys.readouterr().out
    assert "WRONG" in cpu.tables(results)


def test_bench_cpu_quick(tmp_path, capsys):
    target = tmp_path / "cpu.json"
    assert cpu.main(["--quick", "--repeats", "1", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["environment"]["torch"] == torch.__version__ and found["environment"]["threads"] >= 1
    assert {r["what"] for r in found["results"]} == {"forward", "forward + backward", "decode"}
    assert all(r["passed"] and r["ms"] > 0 for r in found["results"])
    assert "tokens/s" in capsys.readouterr().out


def test_bench_ops_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out


def test_bench_ops_leaves_what_it_has(tmp_path, monkeypatch, capsys):
    """A run that is cut off has written and shown each case that it was done with."""
    target, kinds, facts = tmp_path / "ops.json", [], report.environment()

    def run_packed(peer, kind, *_):
        if kind not in kinds and len(kinds) == 2:
            raise KeyboardInterrupt
        kinds.extend({kind} - set(kinds))
        row = {"op": peer.name, "ms": 1.0, "floor_ms": 0.5, "of_floor": 0.5, "passed": True, "errors": {"out": 1e-3}}
        return [row | {"what": what, "bounds": {"out": 1e-2}} for what in ("forward", "backward")]

    for name in ("set_device", "current_device", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "environment", lambda: facts)
    monkeypatch.setattr(ops, "CudaClock", lambda device: None)
    monkeypatch.setattr(ops.floor, "copy_bandwidth", lambda clock: 4e12)
    monkeypatch.setattr(ops, "run_packed", run_packed)
    with pytest.raises(KeyboardInterrupt):
        ops.main(["--quick", "--packed", "--only", "la2 BHND", "--json", str(target)])
    found = json.loads(target.read_text())["results"]
    assert [(r["shape"].rsplit(" ", 1)[1], r["what"]) for r in found] == [
        (kind, what) for kind in kinds for what in ("forward", "backward")
    ]
    shown = capsys.readouterr().out
    assert all(r["shape"] in shown for r in found) and "wrote" not in shown


@pytest.mark.gpu
def test_bench_ops_quick(tmp_path):
    target = tmp_path / "ops.json"
    assert ops.main(["--quick", "--only", "la2", "--json", str(target)]) == 0
    assert all(r["passed"] for r in json.loads(target.read_text())["results"])


def test_peers_compute_what_they_say():
    """On the CPU only our own entries can run; both layouts must be the same operator."""
    *x, slope = problem()
    want = right(*x, slope)["out"]
    for cls in (peers.Ours, peers.OursTokenMajor):
        peer = cls()
        assert peer.missing() is None
        peer.prepare(slope)
        out = peer.head_major(peer.forward(*(peer.lay_out(t) for t in x[:3])))
        assert testing.error(out, want).l2 < 1e-6


def test_a_peer_that_is_not_there_is_named():
    class Absent(peers.Peer):
        module = "no_such_package_for_lightning_attn2"

    assert "no_such_package" in Absent().missing()


def test_table_is_markdown():
    text = report.table(["what", "ms"], [["forward", "1.0"], ["backward", "12.5"]])
    assert text.splitlines() == [
        "| what     |   ms |",
        "|----------|-----:|",
        "| forward  |  1.0 |",
        "| backward | 12.5 |",
    ]


@pytest.mark.skipif(plots.missing() is not None, reason=str(plots.missing()))
def test_what_was_recorded_is_shown_and_drawn(tmp_path, capsys):
    row = {"shape": "1,2,64,128", "floor_ms": 1.0, "passed": True, "errors": {"out": 1e-3}}
    rows = [
        row | {"what": w, "op": op, "ms": ms, "of_floor": 1 / ms}
        for w in ("forward", "backward")
        for op, ms in (("la2 BHND", 1.25), ("la2 BNHD", 2.0), ("fla simple_gla", 4.0))
    ]
    report.write_json(str(tmp_path / "ops.json"), "ops", report.environment(), rows)
    assert ops.main(["--from", str(tmp_path / "ops.json"), "--plot", str(tmp_path / "ops.png")]) == 0
    assert (tmp_path / "ops.png").stat().st_size > 1000
    assert "80 %" in capsys.readouterr().out


def test_the_device_is_kept_busy_for_longer_than_the_host():
    """A call that keeps the host busy for longer would be timed with the host's time in it."""
    assert timing.flushes_behind(0.0) == 2
    for host_s in (1e-6, 1e-4, 6e-4, 5e-3):
        assert timing.flushes_behind(host_s) * timing.FASTEST_FLUSH_S >= 2 * host_s
    assert timing.flushes_behind(60.0) == 100
