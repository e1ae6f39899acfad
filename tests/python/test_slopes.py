"""slopes.py against values worked out by hand from the sources that its docstrings name."""

import math

import pytest
import torch

from lightning_attn2_ext import slopes as la2_slopes

LAYERED = ("minimax", "hf_minimax", "bailing_hf", "bailing_serving", "tnl_paper")


def close(tensor, values):
    torch.testing.assert_close(tensor, torch.tensor(values, dtype=torch.float32), rtol=1e-6, atol=0)


def test_minimax_first_and_last_layer():
    alibi8 = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    close(la2_slopes.minimax(8, 0, 5), [s * 1.00001 for s in alibi8])
    close(la2_slopes.minimax(8, 2, 5), [s * 0.50001 for s in alibi8])
    close(la2_slopes.minimax(8, 4, 5), [s * 1e-5 for s in alibi8])


def test_minimax_64_heads_ends():
    s = la2_slopes.minimax(64, 0, 80)
    assert s[0].item() == pytest.approx(0.9170040432 * 1.00001, rel=1e-6)  # 2^(-1/8)
    assert s[63].item() == pytest.approx(0.00390625 * 1.00001, rel=1e-6)


def test_alibi_between_powers_of_two():
    # Six heads: the four of ALiBi(4), then slopes 0 and 2 of ALiBi(8).
    close(la2_slopes.sala(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    close(la2_slopes.sala(1), [1 / 256])
    close(la2_slopes.sala(3), [1 / 16, 1 / 256, 1 / 4])


def test_hf_minimax_has_no_interpolation():
    close(la2_slopes.hf_minimax(6, 0, 3), [2 ** (-8 * (h + 1) / 6) * 1.00001 for h in range(6)])
    close(la2_slopes.hf_minimax(2, 1, 3), [(1 / 16) * (1 - 1 / 2.00001 + 1e-5), (1 / 256) * (1 - 1 / 2.00001 + 1e-5)])
    # 40 heads: the head where the two conventions differ most.
    ratio = la2_slopes.hf_minimax(40, 0, 2) / la2_slopes.minimax(40, 0, 2)
    assert max(abs(ratio - 1)).item() > 0.5


def test_bailing_conventions_differ_by_one_layer():
    close(la2_slopes.bailing_hf(2, 0, 5), [(1 / 16) * 1.25001, (1 / 256) * 1.25001])
    for layer in range(1, 5):
        assert torch.equal(la2_slopes.bailing_hf(16, layer, 5), la2_slopes.bailing_serving(16, layer - 1, 5))
        assert torch.equal(la2_slopes.bailing_serving(16, layer, 5), la2_slopes.minimax(16, layer, 5))


def test_tnl_paper():
    close(la2_slopes.tnl_paper(4, 0, 2), [0.0, 2.0, 4.0, 6.0])
    close(la2_slopes.tnl_paper(4, 1, 2), [0.0, 1.0, 2.0, 3.0])
    assert la2_slopes.tnl_paper(64)[-1].item() == 7.875


def test_retnet():
    close(la2_slopes.retnet(2), [math.log(32 / 31), math.log(64 / 63)])
    # 1 - 2^-45 is 1 in float32: computed there, the slope would be zero.
    assert la2_slopes.retnet(41)[-1].item() == pytest.approx(2.0**-45, rel=1e-6)


@pytest.mark.parametrize("kind", la2_slopes.NAMES)
def test_one_layer_is_finite_and_positive(kind):
    s = la2_slopes.slopes(kind, 8)
    assert s.dtype == torch.float32 and s.shape == (8,) and s.device.type == "cpu"
    assert torch.isfinite(s).all() and (s >= 0).all()


@pytest.mark.parametrize("kind", ("minimax", "hf_minimax", "bailing_hf", "bailing_serving"))
def test_one_layer_has_the_factor_of_layer_zero(kind):
    close(la2_slopes.slopes(kind, 1), [(1 / 256) * 1.00001])


@pytest.mark.parametrize("kind", la2_slopes.NAMES)
def test_default_dtype_does_not_matter(kind):
    want = la2_slopes.slopes(kind, 40, 3, 12)
    try:
        torch.set_default_dtype(torch.bfloat16)
        got = la2_slopes.slopes(kind, 40, 3, 12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("kind", la2_slopes.NAMES)
def test_tensor_parallel_ranks_are_slices(kind):
    whole = la2_slopes.slopes(kind, 24, 2, 7)
    parts = [la2_slopes.slopes(kind, 24, 2, 7, tp_rank=rank, tp_size=4) for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", la2_slopes.NAMES)
def test_named_function_is_the_named_formula(kind):
    assert torch.equal(getattr(la2_slopes, kind)(12, 1, 3), la2_slopes.slopes(kind, 12, 1, 3))


@pytest.mark.parametrize("kind", LAYERED)
def test_layers_differ(kind):
    assert not torch.equal(la2_slopes.slopes(kind, 8, 1, 4), la2_slopes.slopes(kind, 8, 2, 4))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("alibi", 8), "kind is 'alibi', expected one of minimax"),
        (("minimax", 0), "num_heads is 0, expected at least 1"),
        (("minimax", 8, 4, 4), r"layer_idx is 4, expected 0 to 3 \(num_layers - 1\)"),
        (("minimax", 8, 0, 0), "num_layers is 0, expected at least 1"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        la2_slopes.slopes(*arguments)


def test_tensor_parallel_errors():
    with pytest.raises(ValueError, match="tp_size is 3, expected a divisor of num_heads, 8"):
        la2_slopes.slopes("minimax", 8, tp_size=3)
    with pytest.raises(ValueError, match="tp_rank is 2"):
        la2_slopes.slopes("minimax", 8, tp_rank=2, tp_size=2)
