"""What every test may rely on: hypothesis profiles, Triton's interpreter without a GPU, the `device` fixture."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

# "ci" draws the same examples every time; "thorough" (LA2_HYPOTHESIS_PROFILE=thorough) looks for new ones.
hypothesis.settings.register_profile(
    "ci",
    max_examples=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("ci"), max_examples=1000, derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("LA2_HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(
    scope="session",
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request):
    """Each device the operators run on; the CUDA case is skipped, with the reason, where there is none."""
    return request.param


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device that this torch can use")
