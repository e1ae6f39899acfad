"""bench map: cells, ratios, the picture."""

import pytest
import torch

from lightning_attn2_ext.bench import map as bench_map
from lightning_attn2_ext.bench import peers, plots


class Clock:
    """Every call is made once and takes as long as it is told."""

    device = torch.device("cpu")

    def median(self, call, repeats):
        call()
        return 2.0


class Wrong(peers.Ours):
    name = "wrong"

    def forward(self, q, k, v):
        return 1.01 * super().forward(q, k, v)


def test_a_cell_times_what_is_right_and_names_what_is_not():
    got = bench_map.cell([peers.Ours(), peers.OursTokenMajor(), Wrong()], 2, 70, Clock(), 1)
    assert got["times"]["la2 BHND"] == got["times"]["la2 BNHD"] == {"forward": 2.0, "backward": 2.0}
    assert "wrong result" in got["times"]["wrong"]["failed"]


CELLS = [
    {
        "heads": 4,
        "length": 64,
        "times": {"la2 BHND": {"forward": 1.0}, "la2 BNHD": {"forward": 2.0}, "x": {"forward": 3.0}},
    },
    {
        "heads": 8,
        "length": 64,
        "times": {"la2 BHND": {"forward": 1.0}, "softmax": {"forward": 5.0}, "x": {"failed": "?"}},
    },
]


def test_ratios_take_our_slower_layout_and_the_fastest_peer():
    assert bench_map.ratios(CELLS[0], "forward") == (1.5, None)
    assert bench_map.ratios(CELLS[1], "forward") == (None, 5.0)
    assert bench_map.ratios(CELLS[0], "backward") == (None, None)
    assert "1.5 / -" in bench_map.table(CELLS, "forward") and "- / 5.0" in bench_map.table(CELLS, "forward")
    assert [bench_map.shown(x) for x in (None, 0.924, 0.996, 1.04, 1.14, 12.34)] == [
        "-",
        "0.92",
        "1.00",
        "1.04",
        "1.1",
        "12.3",
    ]


@pytest.mark.skipif(plots.missing() is not None, reason=str(plots.missing()))
def test_picture(tmp_path):
    bench_map.picture(tmp_path / "map.png", CELLS, "caption")
    assert (tmp_path / "map.png").stat().st_size > 1000
