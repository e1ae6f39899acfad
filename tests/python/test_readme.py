"""The code in the README runs as it stands there."""

import functools
import pathlib
import re

import pytest
import torch

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_blocks_run_one_after_the_other(monkeypatch):
    # aot_eager captures the same graph as inductor and needs no compiler at test time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert len(BLOCKS) == 3
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].shape == (3, 8, 64) and not names["out"][1].any()


@pytest.mark.parametrize("kind", re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README.read_text(), re.MULTILINE))
def test_slopes_that_are_named_exist(kind):
    from lightning_attn2_ext import slopes

    assert set(re.findall(r"`(\w+)`", kind)) <= {*slopes.NAMES, "kind"}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
