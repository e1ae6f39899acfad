"""bench compare, speed, memory, decode, accuracy, layer and train: what they check, skip, write and draw."""

import functools
import json
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_attn2_ext.bench import (
    accuracy,
    compare,
    decode,
    entries,
    extend,
    layer,
    machine,
    memory,
    peers,
    plots,
    speed,
    train,
)
from tests.support.tolerance import one_thread

SMALL = ("--heads", "2", "--head-dim", "16", "--lengths", "64", "128", "--repeats", "1", "--device", "cpu")
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("gcc") is None, reason="inductor needs g++ or gcc on PATH"
)


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


class Off(entries.PlainChunks):
    """An operator whose results are a thousandth off."""

    name = "off"

    def forward(self, q, k, v):
        return super().forward(q, k, v) * 1.001


class Absent(peers.Peer):
    name = "absent"
    module = "no_such_package_for_lightning_attn2"


class Broken(peers.Peer):
    name = "broken"

    def prepare(self, slope):
        raise RuntimeError("no kernel\nfor this")


def results(path):
    return json.loads(path.read_text())


def test_compare_without_any_peer(tmp_path, capsys, monkeypatch):
    """What is not there is named; what is there gets a time, a peak and an error, and a picture of each."""
    absent = tuple(type(c.__name__, (c,), {"module": Absent.module}) for c in entries.ENTRIES if c.module)
    there = tuple(c for c in entries.ENTRIES if not c.module)
    monkeypatch.setattr(entries, "ENTRIES", there + absent)
    target = tmp_path / "out.json"
    assert compare.main([*SMALL, "--json", str(target), "--plots", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    for name in ("lightning_attn", "fla simple_gla", "vLLM", "sglang seg_la"):
        assert f"skipped: {name}: ModuleNotFoundError: No module named" in said
    assert "skipped: softmax (cuDNN): runs on a CUDA device only" in said
    found = results(target)
    assert found["environment"]["peers"]["vLLM"].startswith("skipped: ModuleNotFoundError")
    assert {r["op"] for r in found["results"]} == {"la2 BHND", "la2 BNHD", "softmax (SDPA)", "plain PyTorch"}
    assert len(found["results"]) == 4 * 2 * 2
    for r in found["results"]:
        assert r["passed"] and r["ms"] > 0 and r["peak_bytes"] > 0 and 0 < max(r["errors"].values()) < 1e-5
        assert r["tokens_per_s"] == pytest.approx(r["n"] / r["ms"] * 1e3)
        assert r["of_floor"] == pytest.approx(r["floor_ms"] / r["ms"])
    assert "la2 is faster than softmax (SDPA)" in said
    drawn = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert len(drawn) == 8 and all((tmp_path / "plots" / n).read_bytes().startswith(b"\x89PNG") for n in drawn)


def test_peers_for_another_device_are_skipped(capsys):
    class Importable(Absent):
        module = "json"

    found, said = entries.choose(CPU, torch.float32, None, entries=(Importable, entries.Sdpa))
    assert [p.name for p in found] == ["softmax (SDPA)"] and said["absent"] == "skipped: runs on a CUDA device only"


def test_a_wrong_result_gets_no_figures(capsys):
    clock = machine.clock_for(CPU)
    rows = compare.race([Off(), Broken()], (64,), (1, 2, 16), torch.float32, clock, 1e10, 1, ("time", "memory"), 2.0)
    said = capsys.readouterr().out
    wrong, broken = ([r for r in rows if r["op"] == name] for name in ("off", "broken"))
    assert len(wrong) == 2 and not any(r["passed"] or "ms" in r or "peak_bytes" in r for r in wrong)
    assert "WRONG RESULT, no figures: off forward N=64" in said
    assert [r["error"] for r in broken] == ["RuntimeError: no kernel"] * 2
    text = compare.tables(rows)
    assert "WRONG" in text and "failed" in text


def test_what_takes_too_long_leaves_the_race():
    clock = machine.clock_for(CPU)
    found = [entries.PlainChunks(), entries.Sdpa()]
    rows = compare.race(found, (64, 128), (1, 2, 16), torch.float32, clock, 1e10, 1, ("time",), 1e-9)
    assert [r.get("skipped") for r in rows if r["n"] == 64] == [None] * 4
    assert [r.get("skipped") for r in rows if r["n"] == 128] == ["over budget"] * 4
    assert "over budget" in compare.tables(rows)


def test_speed_and_memory(tmp_path, capsys):
    target = tmp_path / "out.json"
    assert speed.main([*SMALL, "--json", str(target)]) == 0
    rows = results(target)["results"]
    assert {r["op"] for r in rows} == {"la2 BHND", "la2 BNHD", "softmax (SDPA)"}
    assert all("ms" in r and "peak_bytes" not in r for r in rows)
    assert memory.main([*SMALL, "--only", "la2", "--json", str(target)]) == 0
    rows = results(target)["results"]
    assert all("ms" not in r for r in rows)
    forward = {r["n"]: r["peak_bytes"] for r in rows if r["what"] == "forward" and r["op"] == "la2 BHND"}
    # The output alone is [1, 2, N, 16] in float32; nothing that grows with the square of the length is held.
    assert all(peak >= 2 * n * 16 * 4 for n, peak in forward.items()) and forward[128] < 3 * forward[64]


def test_peak_memory_is_the_peak():
    size = 1 << 20

    def call():
        a = torch.ones(size, dtype=torch.int8)
        b = torch.ones(2 * size, dtype=torch.int8)
        del b
        return a

    assert 3 * size <= machine.peak_bytes(call, CPU) < 3 * size + 65536
    assert machine.peak_bytes(lambda: None, CPU) < 65536


def test_crossing():
    line = [(256, 2.0), (1024, 8.0), (4096, 32.0)]
    square = [(256, 1.0), (1024, 16.0), (4096, 256.0)]
    x, y = plots.crossing(line, square)
    assert x == pytest.approx(512, rel=1e-6) and y == pytest.approx(4.0, rel=1e-6)
    assert plots.crossing(square, line) is None and plots.crossing(line, []) is None
    assert plots.crossing([(256, 1.0)], [(256, 2.0)]) is None
    rows = [
        {"what": "forward", "op": op, "n": n, "ms": ms}
        for op, values in ((peers.Ours.name, line), (entries.Sdpa.name, square))
        for n, ms in values
    ]
    assert compare.crossings(rows)[0]["where"] == "from N = 512 on"


def test_decode(tmp_path, capsys):
    target = tmp_path / "out.json"
    options = ["--quick", "--device", "cpu", "--heads", "2", "--head-dim", "16", "--contexts", "64"]
    assert decode.main([*options, "--json", str(target), "--plots", str(tmp_path / "plots")]) == 0
    rows = results(target)["results"]
    ours = [r for r in rows if r["op"] == decode.OURS]
    assert [r["batch"] for r in ours] == [1, 2]
    assert all(r["passed"] and r["ms"] > 0 and set(r["errors"]) == {"out", "state"} for r in ours)
    assert {r["op"] for r in rows} >= {"plain PyTorch", decode.SOFTMAX, decode.SCALING, *decode.POOLS}
    assert all(r["passed"] and r["ms"] > 0 for r in rows if r["op"] in decode.POOLS)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    assert "of floor" in capsys.readouterr().out


def test_decode_refuses_a_wrong_step(monkeypatch, capsys):
    true_op = torch.ops.la2.decode

    def ages_twice(q, k, v, state, slope, **options):
        state.mul_(0.999)
        return true_op(q, k, v, state, slope, **options)

    ages_twice.default = true_op.default
    monkeypatch.setattr(torch.ops.la2, "decode", ages_twice)
    assert decode.main(["--quick", "--device", "cpu", "--heads", "2", "--head-dim", "16", "--contexts"]) == 1
    assert "WRONG RESULT, no figures: la2, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("operator", ("verify", "commit"))
def test_decode_refuses_wrong_steps_of_a_draft(monkeypatch, capsys, operator):
    """verify may not touch the states, commit must take in all tokens."""
    true_op = getattr(torch.ops.la2, operator)

    def verify(q, k, v, state, slope, **options):
        out = true_op(q, k, v, state, slope, **options)
        state[0, 0, 0, 0] += 1
        return out

    def commit(k, v, state, accepted, slope, **options):
        true_op(k, v, state, accepted - 1, slope, **options)

    monkeypatch.setattr(torch.ops.la2, operator, {"verify": verify, "commit": commit}[operator])
    assert decode.main(["--quick", "--device", "cpu", "--heads", "2", "--head-dim", "16", "--contexts"]) == 1
    assert f"WRONG RESULT, no figures: la2 {operator}, 8 tokens, batch 1" in capsys.readouterr().out


QUICK_EXTEND = ["--quick", "--device", "cpu", "--heads", "2", "--head-dim", "16"]


@pytest.mark.parametrize("pool", ("fp32", "bf16"))
def test_extend(tmp_path, capsys, pool):
    target = tmp_path / "out.json"
    assert extend.main([*QUICK_EXTEND, "--pool", pool, "--json", str(target)]) == 0
    rows = results(target)["results"]
    assert all(r["passed"] and r["ms"] > 0 for r in rows)
    kinds = {"300 tokens, uniform", "300 tokens, skewed", "300 tokens, random"}
    for name in (extend.EXTEND, extend.SNAPSHOTS, extend.FORWARD):
        assert {r["shape"] for r in rows if r["op"] == name} >= kinds
    decoders = {r["op"] for r in rows if r["shape"] == "6 decode rows"}
    assert decoders == ({extend.EXTEND, extend.DECODE} if pool == "fp32" else {extend.EXTEND})
    assert "of floor" in capsys.readouterr().out


def test_lengths_of_extend():
    for kind in ("uniform", "skewed", "random"):
        lengths = extend.lengths_of(kind, 7, 300)
        assert len(lengths) == 7 and sum(lengths) == 300 and min(lengths) > 0
    assert extend.lengths_of("skewed", 7, 300)[0] == 150
    assert extend.lengths_of("uniform", 1, 300) == extend.lengths_of("skewed", 1, 300) == [300]


def test_extend_refuses_a_wrong_result(monkeypatch, capsys):
    true_op = torch.ops.la2.extend

    def forgets(q, k, v, state, *args, **options):
        state.mul_(0.999)
        return true_op(q, k, v, state, *args, **options)

    forgets.default = true_op.default
    monkeypatch.setattr(torch.ops.la2, "extend", forgets)
    assert extend.main(QUICK_EXTEND) == 1
    assert "WRONG RESULT, not timed: la2::extend" in capsys.readouterr().out


def test_accuracy(tmp_path, capsys):
    target = tmp_path / "out.json"
    options = ["--device", "cpu", "--heads", "2", "--head-dim", "16", "--lengths", "70", "--dtype", "bf16"]
    assert accuracy.main([*options, "--json", str(target), "--plots", str(tmp_path / "plots")]) == 0
    rows = results(target)["results"]
    assert {(r["op"], r["slopes"]) for r in rows} == {
        (op, s) for op in ("la2 BHND", "la2 BNHD", "plain PyTorch") for s in accuracy.LAYERS
    }
    assert all(set(r["errors"]) == {"out", "dq", "dk", "dv"} and 1e-5 < r["errors"]["out"] < 0.02 for r in rows)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    rows = accuracy.measure([Off(), Broken()], (64,), 2, 16, torch.float32, CPU)
    assert not any(r["passed"] for r in rows if r["op"] == "off") and "OUTSIDE" in accuracy.table(rows)


def test_layer(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    # aot_eager captures the same graph as inductor and needs no compiler at test time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for dtype in ("fp32", "bf16"):
        target = tmp_path / f"{dtype}.json"
        assert layer.main(["--quick", "--device", "cpu", "--dtype", dtype, "--json", str(target)]) == 0
        rows = results(target)["results"]
        assert [r["op"] for r in rows] == [layer.AS_IS, layer.OURS] * 2 and all(0 < r["error"] < 0.05 for r in rows)
        assert all(r[k] > 0 for r in rows for k in ("ms", "projections_ms", "rest_ms"))
        assert results(target)["environment"]["rest"] == layer.REST
    said = capsys.readouterr().out
    assert "one token for each of 3" in said and layer.REST in said
    assert layer.main(["--quick", "--device", "cpu", "--compile", "--json", str(target)]) == 0
    ops = [r["op"] for r in results(target)["results"]]
    assert ops == [layer.AS_IS, layer.OURS, layer.COMPILED] * 2


def layer_cases():
    """The layers of the benchmark in float32, and its two inputs: a prefill and a step behind a state."""
    shape, normal = layer.QUICK_SHAPE, functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        modules = layer.layers(shape, torch.float32, CPU)
    heads, dim = shape["num_attention_heads"], shape["head_dim"]
    prefill = normal(1, 300, shape["hidden_size"]), None
    return modules, (prefill, (normal(3, 1, shape["hidden_size"]), normal(3, heads, dim, dim)))


def call_layer(module, x, state, is_ours):
    """The output and the state behind it; the one that is passed in stays."""
    cache = None if state is None else layer._cache(state.clone())
    if is_ours and cache is not None:
        cache = transformers_integration().adopt_cache(cache)
    return module(x, None, None, cache)


def transformers_integration():
    from lightning_attn2_ext.integrations import transformers

    return transformers


@torch.no_grad()
def test_rest_is_all_of_a_layer_but_its_projections():
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    modules, cases = layer_cases()
    for name, is_ours in ((layer.AS_IS, False), (layer.OURS, True)):
        for x, state in cases:
            rest = layer.without_projections(modules[name], x)
            assert type(rest) is type(modules[name]) and not any(isinstance(m, torch.nn.Linear) for m in rest.modules())
            given = [m.result.clone() for m in (rest.qkv_proj, rest.output_gate)]
            between, after = call_layer(rest, x, state, is_ours)
            want, want_after = call_layer(modules[name], x, state, is_ours)
            assert torch.equal(modules[name].out_proj(between), want) and torch.equal(after, want_after)
            for a, m in zip(given, (rest.qkv_proj, rest.output_gate)):
                assert torch.equal(m.result, a)  # a timed call leaves them to the next one


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_rest_compiled_is_the_same_work(backend):
    """Nothing is computed ahead: with other results of the projections there, the same program follows."""
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    modules, cases = layer_cases()
    torch.compiler.reset()
    for x, state in cases:
        rest = layer.without_projections(modules[layer.OURS], x)
        counter = CompileCounterWithBackend(backend)
        compiled, results = torch.compile(rest, fullgraph=True, dynamic=False, backend=counter), []
        for change in (1.0, -0.5):
            rest.qkv_proj.result.mul_(change)
            rest.output_gate.result.mul_(change)
            want = call_layer(rest, x, state, True)
            results.append(call_layer(compiled, x, state, True))
            for a, b in zip(results[-1], want, strict=True):
                assert a.shape == b.shape and (a - b).norm() <= 1e-6 * b.norm()
        assert counter.frame_count == 1 and not torch.equal(results[0][0], results[1][0])
        assert any("la2." in str(n.target) for n in counter.graphs[0].graph.nodes)
    torch.compiler.reset()


def test_layer_refuses_wrong_work_between_its_projections(monkeypatch):
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    right = layer.without_projections
    for factor in (1.01, float("nan")):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "without_projections", lambda module, x, f=factor: right(module, x * f))
            assert layer.main(["--quick", "--device", "cpu"]) == 1


def test_layer_refuses_a_wrong_operator(monkeypatch):
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    integration = transformers_integration()
    right = integration.lightning_attention

    def off(*arguments, **options):
        out, state = right(*arguments, **options)
        out[:, :, 1, ::2] *= 1.5  # a whole row would be scaled back by the norm
        return out, state

    monkeypatch.setattr(integration, "lightning_attention", off)
    assert layer.main(["--quick", "--device", "cpu"]) == 1


def test_train(tmp_path, capsys):
    target = tmp_path / "out.json"
    assert train.main(["--quick", "--device", "cpu", "--json", str(target), "--plots", str(tmp_path / "plots")]) == 0
    reference, ours = results(target)["results"]
    assert (reference["op"], ours["op"]) == (train.REFERENCE, train.OURS)
    assert len(ours["losses"]) == train.QUICK.steps and ours["losses"][-1] < ours["losses"][0]
    assert reference["gap"] == 0.0 and 0.0 <= ours["gap"] < train.LIMIT
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["train_gap.png", "train_loss.png"]
    assert "largest gap" in capsys.readouterr().out


def test_train_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    command = ["--quick", "--device", "cpu", "--json", str(target)]
    trained, train_one = [], train.train

    def counted(name, *arguments):
        trained.append(name)
        if trained == [train.REFERENCE, train.OURS]:
            raise KeyboardInterrupt
        return train_one(name, *arguments)

    monkeypatch.setattr(train, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        train.main(command)
    assert [r["op"] for r in results(target)["results"]] == [train.REFERENCE]
    assert train.main([*command, "--resume"]) == 0
    assert trained == [train.REFERENCE, train.OURS, train.OURS]
    # Another run is no part of this one.
    assert train.main([*command, "--resume", "--seed", "1"]) == 0
    assert trained[3:] == [train.REFERENCE, train.OURS]
    with pytest.raises(SystemExit):
        train.main(["--quick", "--resume"])


def test_train_sees_a_wrong_gradient(monkeypatch):
    """Whose values are right, so that only the later losses can tell."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.linspace(-3, 3, grad.shape[-1])

    right = train.OPERATORS[train.OURS]
    monkeypatch.setitem(train.OPERATORS, train.OURS, lambda q, k, v, s: Doubled.apply(right(q, k, v, s)))
    assert train.main(["--quick", "--steps", "10", "--device", "cpu"]) == 1


def test_the_model_has_40_million_parameters():
    with torch.device("meta"):
        model = train.LanguageModel(train.Size(), train.OPERATORS[train.OURS])
    assert 38e6 < sum(p.numel() for p in model.parameters()) < 43e6


def test_no_cuda_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        decode.main(["--device", "cuda"])


@pytest.mark.gpu
@pytest.mark.parametrize("module", [compare, speed, memory, decode, extend, accuracy, train])
def test_on_a_gpu(module, tmp_path):  # not "benchmark": the plugin pytest-benchmark has a fixture of that name
    target = tmp_path / "out.json"
    assert module.main(["--quick", "--device", "cuda", "--json", str(target)]) == 0
    assert results(target)["environment"]["device"].startswith("cuda")
