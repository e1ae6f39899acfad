"""The code in the README runs as it stands there."""

import functools
import importlib
import importlib.util
import pathlib
import re

import pytest
import torch

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_blocks_run_one_after_the_other(monkeypatch):
    # aot_eager captures the same graph as inductor and needs no compiler at test time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert len(BLOCKS) == 6
    names: dict = {}
    for block in BLOCKS:
        if "from transformers" in block and importlib.util.find_spec("transformers") is None:
            continue
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].shape == (3, 8, 64) and not names["out"][1].any()
    pool, decoded = names["pool"], names["decoded"]
    assert pool.memory_report().used == 4 and decoded[:4].any() and not decoded[4:].any()
    (kept,) = names["beams"][:1]
    assert pool.tensor[:, kept].any() and not torch.equal(pool.tensor[:, kept], pool.tensor[:, names["requests"][0]])
    assert names["drafted"].shape == (3, 4, 8, 64) and not names["drafted"][1].any()


def rows(heading):
    """The cells of the table rows under a heading whose first cell is code."""
    section = re.search(rf"^## {heading}.*?(?=^## |\Z)", README.read_text(), re.MULTILINE | re.DOTALL)[0]
    return [[c.strip() for c in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*\|$", section, re.MULTILINE)]


@pytest.mark.parametrize("kind", [row[0] for row in rows("Slopes")])
def test_slopes_that_are_named_exist(kind):
    from lightning_attn2_ext import slopes

    assert set(re.findall(r"`(\w+)`", kind)) <= {*slopes.NAMES, "kind"}


def test_presets_and_their_parameters_are_as_stated():
    from lightning_attn2_ext.nn import PRESETS, LightningAttention

    stated = {preset.strip("`"): names.strip("`").split() for preset, _, names in rows("The layer")[1:5]}
    assert stated.keys() == PRESETS.keys()
    for preset, names in stated.items():
        own = {name.removesuffix(".weight") for name in LightningAttention(64, 4, preset=preset).state_dict()}
        assert own == set(names), preset


def test_modules_to_import_instead_exist():
    for _, cell in rows("The layer")[5:]:
        module, *names = re.findall(r"`([\w.]+)`", cell)
        assert all(hasattr(importlib.import_module(module), name) for name in names if name != "g_gamma"), cell


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
