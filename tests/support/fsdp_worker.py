"""One of two processes of tests/python/test_nn_fsdp.py: FSDP2 and activation checkpoints around a model.

python -m tests.support.fsdp_worker <rank> <size> <file for the rendezvous> <file for the result>
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from tests.support.models import LanguageModel, tokens

STEPS, ROWS, LENGTH, RATE = 3, 4, 40, 0.1


def train(model, rows, reduce=lambda x: x):
    """Losses of a few steps of plain gradient descent over `rows` of every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        batch = tokens(ROWS, LENGTH + 1, seed=step)[rows]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(reduce(loss.detach()).item())
    return losses


def build(preset):
    torch.manual_seed(0)
    return LanguageModel(preset)


def main(rank, size, rendezvous, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for preset in ("minimax", "ring_linear"):
        model = build(preset)
        model.checkpoints = True
        slopes = [block.mixer.slope.clone() for block in model.blocks]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        sharded = sum(p.to_local().numel() for p in model.parameters())

        def mean(loss):
            dist.all_reduce(loss)
            return loss / size

        losses = train(model, slice(rank * ROWS // size, (rank + 1) * ROWS // size), mean)
        weights = {n: p.full_tensor() for n, p in model.state_dict().items()}
        assert all(torch.equal(b.mixer.slope, s) for b, s in zip(model.blocks, slopes, strict=True))
        found[preset] = {"losses": losses, "weights": weights, "sharded": sharded}
    if rank == 0:
        torch.save(found, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
