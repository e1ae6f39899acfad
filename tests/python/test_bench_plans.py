"""bench plans: what is asked of the planner and of the clock, and the table. Clock and names are those of no GPU."""

import torch

from lightning_attn2_ext.bench import plans

HOPPER = "sm_90x132"


class Clock:
    device = torch.device("cpu")

    def __init__(self):
        self.calls = 0

    def median(self, call, repeats):
        call()
        self.calls += 1
        return self.calls * 1e-3


def test_predictions_are_the_planners():
    us, words = plans.predicted((1, 8, 4096), 128, "forward", HOPPER)
    assert 10 < us < 100 and words.startswith("sm90 tile 128") and "workspace" not in words
    assert plans.predicted((4, 32, 4096), 128, "backward", HOPPER)[0] > us


def test_forced_plans_are_asked_for_and_those_that_cannot_be_are_left_out():
    with plans.forced_plan("family=sm80,segments=3"):
        assert "sm80" in plans.predicted((1, 8, 4096), 128, "forward", HOPPER)[1]
    with plans.forced_plan("segments=4,passes=1"):
        assert plans.predicted((1, 64, 4096), 128, "forward", HOPPER) is None
        assert plans.predicted((1, 8, 4096), 128, "backward", HOPPER) is None


def test_rows_and_table(monkeypatch):
    monkeypatch.setattr(plans.info, "device_name", lambda device: HOPPER)
    clock = Clock()
    rows = plans.measure_shape((1, 2, 70), 16, clock, 1)
    assert clock.calls == len(rows) and {r["what"] for r in rows} == {"forward", "backward"}
    forward = [r for r in rows if r["what"] == "forward"]
    assert [r["plan"] for r in forward if not r["plan"]] == [""] and len(forward) > 4
    text = plans.table(rows)
    assert len(text.splitlines()) == 2 + 2 and "1,2,70" in text and forward[1]["plan"] in text


def test_wrong_results_get_no_time(monkeypatch, capsys):
    monkeypatch.setattr(plans.info, "device_name", lambda device: HOPPER)
    check = plans.gate.check_ends
    monkeypatch.setattr(
        plans.gate, "check_ends", lambda results, *rest: check({n: 1.1 * x for n, x in results.items()}, *rest)
    )
    clock = Clock()
    rows = plans.measure_shape((1, 2, 70), 16, clock, 1)
    assert rows and not any(r["passed"] or "us" in r for r in rows) and clock.calls == 0
    assert "WRONG RESULT" in capsys.readouterr().out and len(plans.table(rows).splitlines()) == 2


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plans.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
