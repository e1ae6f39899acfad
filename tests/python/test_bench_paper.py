"""bench paper: the quick form of every experiment, resuming, the report of what is and is not there, wrong results."""

import dataclasses
import json

import pytest
import torch

from lightning_attn2_ext.bench import entries, machine, peers, train
from lightning_attn2_ext.bench.paper import claims, cli, inference, layers, lengths, longest, loss, results, store
from lightning_attn2_ext.bench.paper.results import EXPERIMENTS
from lightning_attn2_ext.bench.paper.run import judge
from tests.support.tolerance import one_thread

CPU = ("--quick", "--device", "cpu")
FACTS = {"cpu": "a processor", "device": "cpu", "dtype": "float32", "time": "2030-01-01T00:00:00", "package": "0"}
FACTS |= {"torch": "2", "python": "3"}


@pytest.fixture(autouse=True)
def single_thread(monkeypatch):
    # Whoever has the packages or a GPU runs the same race here: what is asked for is the CPU's.
    monkeypatch.setattr(lengths.Run, "peers", property(lambda run: _peers(run)))
    with one_thread():
        yield


RACE = [peers.Ours(), entries.Sdpa()]


def _peers(run):
    run.facts["peers"] = {"lightning_attn": "skipped: not in this test"}
    return RACE


def point_files(folder, letter="*"):
    return sorted(folder.glob(f"points/{letter}/*.json"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole quick run."""
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(lengths.Run, "peers", property(lambda run: _peers(run)))
        patch.setenv("LA2_COMMIT", "abc123")
        assert cli.main([*CPU, "--out", str(folder)]) == 0
    return folder


def test_every_experiment_leaves_its_points(whole):
    for letter in EXPERIMENTS:
        files = point_files(whole, letter)
        assert len(files) >= 2, letter
        for path in files:
            record = json.loads(path.read_text())
            assert record["experiment"] == letter and record["commit"] == "abc123" and record["quick"] is True
            assert record["result"]["passed"] and record["environment"]["torch"] == torch.__version__
    text = (whole / "RESULTS.md").read_text()
    assert "Quick form" in text and "Nothing: every point of every experiment is there." in text
    for module in EXPERIMENTS.values():
        assert f"## ({module.LETTER}) {module.TITLE}" in text
    pictures = sorted((whole / "plots").iterdir())
    assert {p.name[0] for p in pictures} == set(EXPERIMENTS)
    assert all(p.read_bytes().startswith(b"\x89PNG") and f"plots/{p.name}" in text for p in pictures)


def test_every_claim_stands_with_number_hardware_and_command(whole):
    text = (whole / "RESULTS.md").read_text()
    table = text.split("## Claims")[1].split("## What is missing")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    for claim, theirs, their_hardware, ours, our_hardware, command in rows:
        assert claim and theirs and their_hardware and ours
        assert (ours == "not measured") == (our_hardware == "-")
        assert "bench paper --only" in command
    said = {row[0]: row for row in rows}
    # A small model on a CPU says nothing of the sizes that the paper trained.
    assert said["training 0.4B, N = 1,024, tokens/s/GPU"][1:4] == ["38,615", claims.TABLE1_HARDWARE, "not measured"]
    assert "1,620" in said["training 15B, N = 6,144, tokens/s/GPU"]
    assert "needle returned to the bit" in said["the longest sequence"][3]


def test_a_second_run_measures_nothing(whole, capsys, monkeypatch):
    monkeypatch.setenv("LA2_COMMIT", "abc123")
    before = {p: p.stat().st_mtime_ns for p in point_files(whole)}
    assert cli.main([*CPU, "--only", "a,b,e", "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert said.count(": 0 measured, 0 left out") == 3
    assert {p: p.stat().st_mtime_ns for p in point_files(whole)} == before


def test_another_commit_is_measured_anew(tmp_path, monkeypatch):
    for commit in ("one", "two"):
        monkeypatch.setenv("LA2_COMMIT", commit)
        assert cli.main([*CPU, "--only", "e", "--out", str(tmp_path)]) == 0
    assert len(point_files(tmp_path, "e")) == 2 * 3
    text = (tmp_path / "RESULTS.md").read_text()
    assert "3 points" in text and "commit two;" in text  # the newest of each


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LA2_COMMIT", "abc123")
    measure, calls = longest.measure, []

    def interrupted(run, config):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(run, config)

    monkeypatch.setattr(longest, "measure", interrupted)
    assert cli.main([*CPU, "--only", "e", "--out", str(tmp_path)]) == 130
    assert len(point_files(tmp_path, "e")) == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "(e) The longest sequence: 2 of 3 points" in text and "what streamed, tokens 8192" in text
    assert "not measured" in text
    capsys.readouterr()
    assert cli.main([*CPU, "--only", "e", "--out", str(tmp_path)]) == 0
    assert ": 2 measured, 0 left out" in capsys.readouterr().out


def test_out_of_memory_is_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LA2_COMMIT", "abc123")
    measure = longest.measure

    def full(run, config):
        if config["what"] == "streamed":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(run, config)

    monkeypatch.setattr(longest, "measure", full)
    assert cli.main([*CPU, "--only", "e", "--out", str(tmp_path)]) == 0
    assert "Streamed: out of memory." in (tmp_path / "RESULTS.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(longest, "measure", measure)
    for more, measured in (((), 0), (("--again",), 3)):
        assert cli.main([*CPU, "--only", "e", *more, "--out", str(tmp_path)]) == 0
        assert f": {measured} measured, 0 left out" in capsys.readouterr().out


def test_losses_are_compared_with_those_of_the_same_settings():
    def row(op, rate, losses):
        return {"op": op, "losses": losses} | dataclasses.asdict(dataclasses.replace(train.Size(), rate=rate))

    before = [row("la2", 1e-3, [9.0]), row("reference", 1e-3, [3.0])]
    rows = loss.compared([*before, row("la2", 1e-6, [2.0]), row("reference", 1e-6, [2.25])])
    assert [(r["op"], r["rate"], r["gap"]) for r in rows] == [("reference", 1e-6, 0.0), ("la2", 1e-6, 0.25)]
    assert loss.compared([*before, row("la2", 1e-6, [2.0])]) == []  # no reference yet


def test_the_newest_record_comes_last(tmp_path, monkeypatch):
    here = store.where(FACTS, True)
    clock = iter(range(10))
    monkeypatch.setattr(store.time, "time", lambda: next(clock))
    for commit, value in (("abc", 1), ("abc", 2), ("def", 1)):
        store.Store(tmp_path, here, commit).write("e", {"what": value}, {"passed": True}, 0.0, FACTS)
    found = store.Store(tmp_path, here, "def").records("e")
    assert [(r["config"]["what"], r["commit"]) for r in found] == [(2, "abc"), (1, "def")]


def test_missing_leaves_what_another_commit_has(tmp_path, monkeypatch, capsys):
    command = [*CPU, "--only", "e", "--out", str(tmp_path)]
    for commit, more, measured in (("abc", (), 3), ("def", ("--missing",), 0), ("def", (), 3)):
        monkeypatch.setenv("LA2_COMMIT", commit)
        assert cli.main([*command, *more]) == 0
        assert f": {measured} measured, 0 left out" in capsys.readouterr().out
    for path in (tmp_path / "points" / "e").iterdir():
        record = json.loads(path.read_text())
        if record["config"]["what"] == "streamed":
            path.write_text(json.dumps(record | {"result": {"failed": "once", "passed": False}}))
    assert cli.main([*command, "--missing"]) == 0
    assert ": 1 measured, 0 left out" in capsys.readouterr().out


def test_the_whole_form_on_a_gpu_has_what_the_paper_has(tmp_path):
    """What would run there: lengths from 1K to 1M, the sizes of Table 1, a million positions, 16 M tokens streamed."""
    facts = FACTS | {"device": "cuda:0", "gpu": "a GPU", "dtype": "bfloat16"}
    run = lengths.Run(
        torch.device("cuda", 0), torch.bfloat16, False, facts, store.Store(tmp_path, store.where(facts, False), "abc")
    )
    points = {letter: module.points(run) for letter, module in EXPERIMENTS.items()}
    for found in points.values():  # a point is found by its configuration
        assert len({json.dumps(c, sort_keys=True) for c in found}) == len(found)
    ours = [c for c in points["a"] if c["op"] == "la2 BHND"]
    assert {1 << i for i in range(10, 21)} <= {c["n"] for c in ours}
    assert {c["b"] * c["n"] for c in ours} == {1 << 20, 4 * 32768}
    # Every length at which the paper's table has a number for the claims, and the last one for the ratio.
    cited = {"0.4B": claims.TABLE1_LENGTHS, "1B": (1024, 81920, 94208), "3B": (1024, 32768, 94208)}
    for size, lengths_of in cited.items():
        for op in ("la2", "softmax (SDPA)"):
            have = {c["n"] for c in points["b"] if c["model"] == size and c["op"] == op}
            assert have >= set(lengths_of)
    assert any(c["model"] == "15B" and c["n"] == 6144 for c in points["b"])
    assert max(c["n"] for c in points["c"] if c["op"] == "la2") == 1 << 20
    assert {c["part"] for c in points["d"]} == {"block", "share", "dtype", "state", "plan", "slopes"}
    assert any(c["what"] == "streamed" and c["tokens"] == 1 << 24 for c in points["e"])
    assert len({c["layer"] for c in points["g"]}) == 5


def test_no_time_left_is_said(tmp_path, capsys):
    assert cli.main([*CPU, "--only", "a", "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    assert "6 points left out for want of time" in capsys.readouterr().out
    assert (
        "(a) The operator against length, at a constant number of tokens: 6 of 6 points"
        in (tmp_path / "RESULTS.md").read_text()
    )


def test_a_report_of_files_alone(whole, capsys, tmp_path):
    (whole / "RESULTS.md").unlink()
    assert cli.main(["--report", "--out", str(whole)]) == 0
    assert "## Claims" in (whole / "RESULTS.md").read_text()
    with pytest.raises(SystemExit, match="no points"):
        cli.main(["--report", "--out", str(tmp_path)])


class Off(peers.Ours):
    """A thousandth too large."""

    def forward(self, q, k, v):
        return super().forward(q, k, v) * 1.001


OFF = [Off()]


def test_a_wrong_operator_gets_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lengths.Run, "peers", property(lambda run: OFF))
    assert cli.main([*CPU, "--only", "a", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("WRONG RESULT, no figures") == 3
    assert all("forward_ms" not in json.loads(p.read_text())["result"] for p in point_files(tmp_path, "a"))
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| WRONG RESULT |" in text and "operator, forward: time linear in length" in text


def test_a_failure_is_written_down_and_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LA2_COMMIT", "abc123")
    measure = layers.measure

    def broken(run, config):
        if config["layer"].startswith("RetNet") and config["op"] == "la2":
            raise RuntimeError("no kernel\nfor this")
        return measure(run, config)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "measure", broken)
        assert cli.main([*CPU, "--only", "g", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "RuntimeError: no kernel" in text and "(g) Other architectures: 1 of 15 points" in text
    capsys.readouterr()
    assert cli.main([*CPU, "--only", "g", "--out", str(tmp_path)]) == 0
    assert ": 1 measured, 0 left out" in capsys.readouterr().out
    assert "no kernel" not in (tmp_path / "RESULTS.md").read_text()


def _run(tmp_path):
    facts = dict(FACTS)
    keep = store.Store(tmp_path, store.where(facts, True), "abc")
    return lengths.Run(torch.device("cpu"), torch.float32, True, facts, keep)


@pytest.mark.parametrize("wrong", ("state", "needle", "memory"))
def test_the_stream_is_held_to_what_it_claims(tmp_path, monkeypatch, wrong):
    """A state that is off, a needle that has faded by a rounding, memory that grows: each is seen."""
    run = _run(tmp_path)
    config = next(c for c in longest.points(run) if c["what"] == "streamed")
    assert longest.measure(run, config)["passed"]
    exact = torch.ops.la2.forward_with_state

    class Wrong:
        decode = torch.ops.la2.decode

        @staticmethod
        def forward_with_state(*arguments, **options):
            out, state = exact(*arguments, **options)
            if wrong == "state":
                state[:, 2:] *= 1 + 1e-6
            elif wrong == "needle":
                state[:, 0] *= 1 + 1e-7
            return out, state

    monkeypatch.setattr(longest.torch, "ops", type("Ops", (), {"la2": Wrong}))
    if wrong == "memory":
        grown = iter(range(0, 1 << 40, 1 << 30))
        monkeypatch.setattr(longest, "_held", lambda run: next(grown))
    assert not longest.measure(run, config)["passed"]


@pytest.mark.parametrize("backward", (False, True))
def test_one_call_is_held_to_its_whole_length(tmp_path, monkeypatch, backward):
    """The state forgets one token in the middle: only the edges that see the whole length can tell."""
    run = _run(tmp_path)
    config = {"what": "one call", "backward": backward, "h": 3, "d": 16}
    assert longest.measure(run, config)["passed"]
    forward, gradient = torch.ops.la2.forward, torch.ops.la2.backward

    class Forgetful:
        @staticmethod
        def forward(q, k, v, slope):
            k = k.clone()
            k[:, :, 2000] = 0
            return forward(q, k, v, slope)

        @staticmethod
        def backward(grad_out, state, q, k, v, slope, need_dslope):
            grad_out, k = grad_out.clone(), k.clone()
            grad_out[:, :, 2000] = 0
            return gradient(grad_out, state, q, k, v, slope, need_dslope=need_dslope)

    monkeypatch.setattr(longest.torch, "ops", type("Ops", (), {"la2": Forgetful}))
    result = longest.measure(run, config)
    assert not result["passed"] and "ms" not in result


@pytest.mark.parametrize("heads", (1, 2, 5))
@pytest.mark.parametrize("batch", (1, 3))
def test_the_gate_looks_at_the_corners(batch, heads):
    """The first and last batch row, the steepest and the flattest head, by their own slopes."""
    inputs = machine.qkv(batch, heads, 70, 16, torch.float32, torch.device("cpu"))
    slope, own = torch.linspace(1, 0.01, heads), peers.Ours()
    leaves = [x.requires_grad_() for x in inputs[:3]]
    out = torch.ops.la2.forward(*leaves, slope)
    results = {"out": out.detach()} | dict(
        zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, inputs[3]), strict=True)
    )
    inputs = [x.detach() for x in inputs]
    assert judge(own, results, inputs, slope).passed
    for corner in {(b, h) for b in (0, batch - 1) for h in (0, heads - 1)}:
        for name in results:
            wrong = {n: x.clone() for n, x in results.items()}
            wrong[name][corner] *= 1.001
            verdict = judge(own, wrong, inputs, slope)
            assert not verdict.passed and [n for n in wrong if verdict.errors[n] > verdict.bounds[n]] == [name]


def test_inference_is_held_to_float64(tmp_path, monkeypatch):
    run = _run(tmp_path)
    config = {"op": inference.OURS, "batch": 1, "n": 300}
    assert inference.measure(run, config)["passed"]
    decode = inference.LightningAttention._decode
    monkeypatch.setattr(
        inference.LightningAttention, "_decode", lambda self, *a: decode(self, *a) * (1 + 1e-4 * (self.layer_idx == 1))
    )
    # The norm behind the operator would hide a common factor.
    monkeypatch.setattr(inference._Mixer, "_part", lambda self, part: _without_norm(self, part))
    assert not inference.measure(run, config)["passed"]
    inference.release()


def _without_norm(layer, part):
    return torch.nn.Identity() if part == "norm" else getattr(layer, layer.preset.names[part])


def test_layers_are_held_to_float64(tmp_path, monkeypatch):
    run = _run(tmp_path)
    name = "MiniMax-Text-01 layer"
    stack = layers.stack_of(run, name)
    x, grad_out = torch.randn(2, 1, 96, 64, generator=torch.Generator().manual_seed(0))
    assert layers.verdict(stack, x, grad_out)["passed"]
    off = lambda q, k, v, slope, scale: torch.ops.la2.forward(q, k, v, slope * 1.0001, scale=scale)  # noqa: E731
    monkeypatch.setattr(layers, "ours", off)
    assert not layers.verdict(stack, x, grad_out)["passed"]
    layers.release()


def test_the_papers_table_is_whole():
    assert set(claims.TABLE1) == {(s, m) for s in ("0.4B", "1B", "3B") for m in claims.TABLE1_MODELS}
    assert all(len(row) == len(claims.TABLE1_LENGTHS) for row in claims.TABLE1.values())
    assert claims.table1("1B", "TNL-LA2", 94208) == "OOM" and claims.table1("0.4B", "TNL-LA2", 94208) == "38,596"
    assert claims.table1("0.4B", "TNL-LA2", 12345) == "-"


def test_what_is_measured_makes_the_claims():
    """Made-up points of the full form: each claim picks the right one."""

    def op(n, b, forward, **more):
        return {"op": "la2 BHND", "b": b, "h": 16, "n": n, "d": 128, "forward_ms": forward, "backward_ms": 3.0} | more

    a = [op(8192, 128, 4.0, backward_peak_bytes=100), op(1 << 20, 1, 4.1, backward_peak_bytes=102)]
    a += [op(256, 4096, 4.0), op(512, 2048, 4.0)]
    a += [r | {"op": "softmax (cuDNN)", "forward_ms": r["n"] / 100, "backward_ms": r["n"] / 100} for r in a]
    a.append({"op": "la2 BHND"} | lengths.README | {"forward_ms": 1.5, "backward_ms": 4.5})
    b = [
        {"model": "0.4B", "op": o, "n": n, "tokens_per_s": t}
        for o, n, t in (("la2", 1024, 100_000.0), ("la2", 94208, 99_000.0), ("softmax (SDPA)", 94208, 9_000.0))
    ]
    said = {c.text: c.ours for c in claims.claims({x: [] for x in "cdefg"} | {"a": a, "b": b})}
    assert said["operator, forward: time linear in length"] == "97.6 % (N = 1,048,576 against 8,192)"
    assert said["operator, forward, B4 H32 N32768 D128"] == "1.500 ms"
    assert 256 < float(said["operator, forward: the length from which it is faster than softmax attention"]) < 512
    assert said["operator, backward: the length from which it is faster than softmax attention"] == "300"
    assert said["training 0.4B, N = 94,208, tokens/s/GPU"] == "99,000"
    assert said["training 0.4B: speed at 94,208 over that at 1,024"] == "0.990"
    assert said["training 0.4B, N = 94,208: over softmax attention"] == "11.00x"
    assert said["training 3B, N = 1,024, tokens/s/GPU"] is None
    assert said["the longest sequence"] is None
    assert results.EXPERIMENTS.keys() == set("abcdefg")
