"""The demo and the benchmark on several processes."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_attn2_ext.bench import scale
from tests.support import on_ranks_demo


def test_training_split_over_ranks_is_training(ranks):
    (alone, weights), *_ = ranks(2).run(on_ranks_demo.curve, False)
    for curve, others in ranks(2).run(on_ranks_demo.curve, True):
        assert len(curve) == len(alone) == on_ranks_demo.RECIPE.steps
        assert alone[0][1] - alone[-1][1] > 1, "it did not learn"
        # The loss of a step is computed in float32 from float64 logits.
        for (seen, bits), (_, want) in zip(curve, alone, strict=True):
            assert abs(bits - want) < 16 * torch.finfo(torch.float32).eps * want, seen
        for a, b in zip(weights, others, strict=True):
            assert (a - b).abs().max() < 1e-4 * a.abs().max()  # the optimizer divides by gradients that are near zero


def test_the_code_in_the_readme(ranks):
    text = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text()
    (code,) = re.findall(r"^    from lightning_attn2_ext\.distributed .*\n(?:    .*\n|\n)*", text, re.MULTILINE)
    tokens = torch.randint(50, (1, 21), generator=torch.Generator().manual_seed(0))
    found = ranks(2).run(on_ranks_demo.run_code, textwrap.dedent(code), tokens)
    for out, want, _ in found:
        assert (out - want).abs().max() < 1e-12 * want.abs().max()
    assert torch.cat([labels for _, _, labels in found], 1).tolist() == [[*tokens[0, 1:].tolist(), -100]]


def test_demo_by_torchrun(tmp_path):
    options = ["--context-parallel", "--quick", "--steps", "3", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["-m", "lightning_attn2_ext", "demo", *options],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "windows split over 2 processes: [64, 64] bytes" in done.stdout
    assert done.stdout.count("6. Summary") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 3 and len(summary["training_bits_per_byte"]) == 3


def test_demo_without_torchrun_says_how(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_attn2_ext", "demo", "--context-parallel", "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0 and "torchrun --nproc-per-node 2 -m lightning_attn2_ext demo" in done.stderr


def test_scale_shows_no_time_for_a_wrong_result(ranks):
    for wrong, right in ranks(2).run(on_ranks_demo.wrong_scale):
        assert not wrong["calls"][0]["passed"] and "seconds" not in wrong["calls"][0]
        assert right["calls"][0]["passed"] and min(right["calls"][0]["seconds"].values()) > 0
        assert right["calls"][0]["bytes"] == 2 * 4 * 2 * 16 * 16  # forward and backward, W = 2
        chosen = scale.Sizes(2, 16, "float32", (96,), (32, 64), (), 1)
        assert "WRONG" in scale.measured_table([wrong], chosen)


def test_scale_by_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "WORLDS", (1, 2))
    assert scale.main(["--quick", "--repeats", "1", "--json", str(tmp_path / "scale.json")]) == 0
    shown = capsys.readouterr().out
    assert "2 processes, N = 2048, forward + backward" in shown and "1024 ranks" in shown and "N = 67,108,864" in shown
    setting, *results = json.loads((tmp_path / "scale.json").read_text())["results"]
    assert [r["world"] for r in results] == [1, 2]
    state = 4 * setting["setting"]["heads"] * setting["setting"]["head_dim"] ** 2
    for result in results:
        assert [call["bytes"] for call in result["calls"]] == [2 * (result["world"] - 1) * state] * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes(device):
    """What is fitted is no whole call, or the model would be checked against itself."""
    chosen = scale.sizes(device, False, 3)
    assert chosen.repeats == 3 and chosen.state_bytes == 4 * chosen.heads * chosen.head_dim**2
    assert not {n // w for n in chosen.lengths for w in (2, 4)} & set(chosen.fit)


def test_line():
    assert scale.line([(1.0, 5.0), (3.0, 9.0)]) == pytest.approx((3.0, 2.0))
    assert scale.line([(0, 1.0), (1, 3.1), (2, 4.9)]) == pytest.approx((1.05, 1.95))
    assert scale.line([(1.0, 5.0), (3.0, 4.0)]) == (4.5, 0.0)  # times do not fall


def test_model_adds_up():
    """By hand: two exchanges of a ring of seven steps, a constant, tokens over ranks, and the sum of eight blocks."""
    forward, both = scale.KINDS
    model = scale.Model(
        one={forward: (0.0, 1e-6), both: (1e-3, 3e-6)},
        alone={forward: (1e-3, 2e-6), both: (2e-3, 4e-6)},
        combine=(1e-5, 1e-6),
        alpha=1e-5,
        beta=1e-9,
        state_bytes=100_000,
    )
    gather = 7 * (1e-5 + 1e-4)
    assert model.seconds(forward, 8, 8000) == pytest.approx(1e-3 + 2e-3 + gather + 1.8e-5)
    assert model.seconds(both, 8, 8000) == pytest.approx(2e-3 + 4e-3 + 2 * (gather + 1.8e-5))
    assert model.efficiency(both, 8, 8000) == pytest.approx((1e-3 + 24e-3) / 8 / model.seconds(both, 8, 8000))
