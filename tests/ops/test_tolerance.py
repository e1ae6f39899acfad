"""The bound that other tests hold results to: every yardstick computes the same, and what is off does not pass."""

import dataclasses

import pytest
import torch

from tests.support import tolerance
from tests.support.cases import Case

CASES = [
    Case(heads=2, batch=2, length=70, key_dim=24, value_dim=40, slope="mixed", state_layout="vk"),
    Case(heads=3, lengths=(0, 5, 64, 1), key_dim=32, value_dim=16, slope="mixed", slope_per_seq=True, scale=0.125),
    Case(heads=1, length=9, key_dim=8, value_dim=8, slope="extreme", state_layout=None),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backward", [False, True])
def test_yardsticks_are_the_same_but_for_rounding(case, backward):
    inputs = case.make()
    plain_of = tolerance._plain_backward if backward else tolerance._plain_forward
    truth = (tolerance.gradient_truth if backward else tolerance.forward_truth)(inputs)
    for chunk, seed in tolerance.YARDSTICKS:
        for name, x in tolerance._reordered(plain_of, inputs, chunk, seed).items():
            want = truth[name].double()
            assert x.shape == want.shape, name
            # Some hundred roundings of 6e-8; the terms of dslope cancel. A wrong order is off by all there is.
            few = 1e-4 if name == "dslope" else 1e-5
            assert (x - want).abs().max() <= few * want.abs().max().clamp(min=1e-30), (name, chunk, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_what_is_off_does_not_pass(case, dtype):
    inputs = dataclasses.replace(case, dtype=dtype).make()
    truth = tolerance.forward_truth(inputs)
    out, state = truth["out"].to(dtype), truth["final_state"].float()
    tolerance.check_forward(inputs, out, state)
    # The bound of these cases is 22 eps in float32 (where nothing decays) and 1.5 in bfloat16.
    few = (100 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    for head in range(case.heads):
        wrong = out.clone()
        wrong[-1, head] *= 1 + few
        with pytest.raises(AssertionError, match="out: two_norm of the error is"):
            tolerance.check_forward(inputs, wrong, state)
    with pytest.raises(AssertionError, match="final_state: "):
        tolerance.check_forward(inputs, out, state * (1 + 2e-2))
