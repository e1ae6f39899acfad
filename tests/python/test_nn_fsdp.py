"""FSDP2 with activation checkpoints on two processes: the training of one process that sees the whole batch."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from tests.support import fsdp_worker

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, "-m", "tests.support.fsdp_worker"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "meet"), str(tmp_path / "result.pt")],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [w.returncode for w in workers] == [0, 0], "\n".join(said)
    for preset, found in torch.load(tmp_path / "result.pt").items():
        model = fsdp_worker.build(preset)
        total = sum(p.numel() for p in model.parameters())
        assert found["sharded"] < 0.6 * total
        losses = fsdp_worker.train(model, slice(None))
        # Sums over the batch in another order, through three steps.
        assert found["losses"] == pytest.approx(losses, rel=1e-5) and losses[2] != losses[0]
        for name, want in model.state_dict().items():
            assert (found["weights"][name] - want).norm() <= 1e-5 * want.norm(), name
