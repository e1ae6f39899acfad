"""bench energy: rounds, joules, the gate and the table. The clock and the counter of energy are those of no GPU."""

import sys
import types

import pytest
import torch

from lightning_attn2_ext import slopes
from lightning_attn2_ext.bench import energy, entries, gate, ops, peers


class Clock:
    device = torch.device("cpu")

    def median(self, call, repeats):
        call()
        return 2.0

    def synchronize(self):
        pass


class Meter:
    """Ten joules from one look to the next."""

    def __init__(self, step=10.0):
        self.looks, self.step = 0, step

    def joules(self):
        self.looks += 1
        return None if self.step is None else self.looks * self.step


def measure(meter, peer=None):
    sets = [ops.draw_inputs(1, 2, 70, 16, 16, torch.bfloat16, "cpu", seed) for seed in range(3)]
    return energy.measure(peer or peers.Ours(), sets, slopes.minimax(2, 0, 80), Clock(), meter, 0.0, 1)


def test_layers_take_the_inputs_in_turn_and_the_first_round_is_not_counted():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    made, taken, joules = energy.sustain(calls, 0.0, Meter().joules, lambda: seen.append("wait"), layers=4)
    assert (made, joules) == (4, 10.0) and taken > 0
    assert seen == [0, 1, 2, 0, "wait", 1, 2, 0, 1, "wait"]
    assert energy.sustain(calls, 0.0, lambda: None, lambda: None)[2] is None
    made, taken, _ = energy.sustain([lambda: None], 0.01, Meter().joules, lambda: None)
    assert taken >= 0.01 and made % energy.LAYERS == 0


def test_rows_and_table():
    rows = measure(Meter())
    assert [r["what"] for r in rows] == ["forward", "backward"] and all(r["passed"] for r in rows)
    for r in rows:
        assert r["calls"] == energy.LAYERS and r["flushed_ms"] == 2.0 and r["ms"] > 0
        assert r["joules_per_mtoken"] == pytest.approx(10 / energy.LAYERS / 70 * 1e6)
        assert r["watts"] == pytest.approx(10 / (r["ms"] * r["calls"] * 1e-3))
    text = energy.table(rows)
    assert len(text.splitlines()) == 2 + 2 and "1,2,70,16" in text and f"{rows[0]['joules_per_mtoken']:.2f}" in text


def test_without_a_counter_there_are_times_alone():
    rows = measure(Meter(None))
    assert all(r["watts"] is None and r["joules_per_mtoken"] is None and r["ms"] > 0 for r in rows)
    assert energy.table(rows).splitlines()[2].rstrip(" |").endswith("-")


def test_wrong_results_get_no_figures(capsys, monkeypatch):
    check = gate.check_ends
    monkeypatch.setattr(gate, "check_ends", lambda got, *rest: check({n: 1.1 * x for n, x in got.items()}, *rest))
    meter = Meter()
    rows = measure(meter)
    assert meter.looks == 0 and not any(r["passed"] or "ms" in r for r in rows)
    assert "WRONG RESULT" in capsys.readouterr().out and "WRONG" in energy.table(rows)


def test_a_call_that_raises_is_a_row_and_only_ours_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    error = ValueError("no\nsuch shape")
    ours, theirs = (entries.failure(peer, error, torch.device("cuda", 0)) for peer in (peers.Ours(), peers.Fla()))
    assert not ours["passed"] and theirs["passed"] and theirs["error"] == "ValueError: no"
    assert f"failed: {peers.Fla.name}: ValueError: no\n" in capsys.readouterr().out
    row = theirs | {"shape": "1,2,3,8", "what": "forward"}
    assert "failed" in energy.table([row]) and peers.Fla.name in energy.table([row])


def test_the_counter_is_that_of_the_device(monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-1-2-3": 7}[uuid]
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 1500 * handle
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2-3"))
    assert energy.Meter(torch.device("cuda", 0)).joules() == 10.5
    del nvml.nvmlDeviceGetTotalEnergyConsumption
    without = energy.Meter(torch.device("cuda", 0))
    assert without.joules() is None and "nvmlDeviceGetTotalEnergyConsumption" in without.reason


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().out
