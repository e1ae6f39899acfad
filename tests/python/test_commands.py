"""The command line: info, check and the demo, each in a process of its own as people run them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lightning_attn2_ext import check, info


def command(*arguments, timeout=300, **environment):
    # One thread: tests share the machine, and two threads that wait for each other cost more than they gain.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "lightning_attn2_ext", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )


def test_usage():
    assert command("--help").returncode == 0
    wrong = command("dance")
    assert wrong.returncode == 2 and "unknown command: dance" in wrong.stderr and "bench cpu" in wrong.stderr


def test_info():
    done = command("info")
    assert done.returncode == 0, done.stderr
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert torch.__version__ in facts["torch"].strip()
    assert "liblightning_attn2.so" in facts["cpu library"]
    assert any(name in facts["cpu"] for name in ("avx512", "avx2", "baseline"))


def test_info_reads_the_library():
    assert isinstance(info.build_info(), dict) and "compiler" in info.build_info()
    assert info.cpu_kernels() in ("avx512", "avx2", "baseline")


def test_info_survives_a_library_without_functions(monkeypatch):
    monkeypatch.setattr(info, "libraries", dict)
    assert info.build_info() is None and info.cpu_kernels() is None
    assert info.plan_line("1,8,1024,64,64,bf16", "sm_90x132").startswith("no plan")
    assert dict(info.lines())["cpu library"] == "not loaded"


def test_info_plan():
    line = info.plan_line("1,64,8192,128,128,bf16", "sm_90x132")
    if line == "no plan: this build has no la2_plan_line":
        pytest.skip(line)
    assert "sm_90x132" in line and "sm90" in line
    assert "sm80" in info.plan_line("1,64,8192,128,128,bf16", "sm_80x108")
    assert info.plan_line("1,64,8192,100,128,bf16", "sm_90x132").startswith("no plan: ")
    done = command("info", "--plan", "1,8,512,64,64,fp32", "--device", "sm_80x108")
    assert done.returncode == 0 and "simt" in done.stdout
    assert command("info", "--plan", "nonsense").returncode == 1


def test_check_one_dtype():
    done = command("check", "--device", "cpu", "--dtype", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 checks passed" in done.stdout


def test_check_fails_on_a_wrong_kernel(monkeypatch):
    """An op whose output is off by a thousandth must not pass, nor one that raises."""
    true_op = torch.ops.la2.forward_with_state

    def wrong(*arguments, **options):
        out, state = true_op(*arguments, **options)
        return out * 1.001, state

    def broken(*arguments, **options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch.ops.la2, "forward_with_state", wrong)
    lines = {line.case: line for line in check.run([torch.device("cpu")], ["fp32"])}
    assert not lines["gradients"].passed and "e-04 <= " in lines["gradients"].shown
    assert not lines["split in three, state handed on"].passed
    assert lines["decode, slots and padding"].passed
    monkeypatch.setattr(torch.ops.la2, "forward_with_state", broken)
    lines = {line.case: line for line in check.run([torch.device("cpu")], ["fp32"])}
    assert not lines["gradients"].passed and lines["gradients"].shown == "RuntimeError: no kernel"


def test_demo_quick(tmp_path):
    done = command("demo", "--quick", "--device", "cpu", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 30 and 0 < summary["held_out_bits_per_byte"] < 8
    assert summary["baselines_bits_per_byte"]["order-0 entropy"] < 8
    assert len(summary["mixer_tokens_per_s"]["la2"]) == 3
    assert (tmp_path / "out" / "sample.txt").stat().st_size > 40
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no plot: matplotlib is not installed" in done.stdout
    else:
        assert (tmp_path / "out" / "constant_speed.png").read_bytes().startswith(b"\x89PNG")


def test_demo_without_matplotlib_and_tqdm_finishes(tmp_path):
    for name in ("matplotlib", "tqdm"):
        (tmp_path / "hidden" / name).mkdir(parents=True)
        (tmp_path / "hidden" / name / "__init__.py").write_text(f"raise ImportError('{name} is hidden')\n")
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"line {i} of a small text\n" * 200)
    path = os.pathsep.join(filter(None, [str(tmp_path / "hidden"), os.environ.get("PYTHONPATH")]))
    done = command(
        "demo",
        "--quick",
        "--steps",
        3,
        "--device",
        "cpu",
        "--text-dir",
        tmp_path,
        "--out",
        tmp_path / "o",
        PYTHONPATH=path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no plot: matplotlib is not installed" in done.stdout
    assert not (tmp_path / "o" / "constant_speed.png").exists()


def test_demo_is_reproducible(tmp_path):
    bits = []
    for turn in range(2):
        done = command("demo", "--quick", "--steps", 4, "--device", "cpu", "--seed", 7, "--out", tmp_path / str(turn))
        assert done.returncode == 0, done.stdout + done.stderr
        bits.append(json.loads((tmp_path / str(turn) / "summary.json").read_text())["held_out_bits_per_byte"])
    assert bits[0] == bits[1]


def test_demo_says_when_there_is_no_text(tmp_path):
    done = command("demo", "--quick", "--text-dir", tmp_path, "--out", tmp_path / "out")
    assert done.returncode != 0 and "too little to train on" in done.stderr


def test_demo_generate(tmp_path):
    kept = tmp_path / "model.pt"
    for turn in ("trained for 30 steps", f"weights of {kept}"):
        done = command("demo", "generate", "--quick", "--device", "cpu", "--bytes", 24, "--model", kept)
        assert done.returncode == 0, done.stdout + done.stderr
        assert turn in done.stdout and done.stdout.count(": yes") >= 3
        assert "0 of 4 slots in use (peak 4)" in done.stdout
    wrong = command("demo", "generate", "--slots", 0)
    assert wrong.returncode == 2 and "--slots is 0, expected at least 1" in wrong.stderr
