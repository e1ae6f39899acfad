"""Context parallelism over NCCL, a rank on each of two GPUs."""

import pytest
import torch

from lightning_attn2_ext.distributed import chain
from tests.python.test_distributed import joined
from tests.support import on_ranks, tolerance
from tests.support.cases import Case
from tests.support.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def two():
    processes = Ranks(2, backend="nccl")
    yield processes
    processes.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", chain.LAYOUTS)
@pytest.mark.parametrize("told", [True, False])
def test_within_the_bound_of_one_kernel(two, dtype, packed, layout, told):
    lengths = [900, 637]
    shape = {"lengths": (1000, 0, 500, 37)} if packed else {"length": sum(lengths)}
    case = Case(heads=3, key_dim=128, value_dim=64, dtype=dtype, slope="mixed", scale=0.125, **shape)
    inputs = case.make()
    whole = [*inputs.args, inputs.initial_state, *inputs.grads]
    options = {"cu_seqlens": inputs.cu_seqlens, "scale": inputs.scale}
    found = two.run(on_ranks.shards_on_gpu, whole, lengths, layout, told, options)
    rows = [joined([x[i] for x in found], lengths, layout) for i in (0, 2, 3, 4)]
    assert torch.equal(found[0][1], found[1][1]), "final states differ between ranks"
    tolerance.check_forward(inputs, rows[0], found[0][1])
    tolerance.check_backward(inputs, [*rows[1:], *found[0][5:]])
