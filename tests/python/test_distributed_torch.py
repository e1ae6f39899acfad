"""The operators in the company of torch's own parallelism: DTensor, FSDP2, activation checkpointing."""

import pytest

from tests.support import on_ranks_torch


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(
    "mesh_shape, placements", [((2,), "r"), ((2,), "b"), ((2,), "h"), ((2, 2), "bh"), ((2, 2), "hb"), ((2, 2), "hh")]
)
def test_shards_of_batch_and_heads_need_no_communication(ranks, mesh_shape, placements, two):
    world = 2 ** len(mesh_shape)
    for error, collectives, as_expected in ranks(world).run(
        on_ranks_torch.on_batch_and_heads, mesh_shape, placements, two
    ):
        assert error < 1e-12 and collectives == 0 and as_expected


def test_decode_of_sharded_heads(ranks):
    for error, collectives in ranks(2).run(on_ranks_torch.decoding):
        assert error < 1e-12 and collectives == 0


def test_shards_of_tokens_are_refused_by_name(ranks):
    for found, collectives in ranks(2).run(on_ranks_torch.refused):
        cp = "lightning_attn2_ext.distributed.lightning_attention_cp"
        for name, op in (("forward", "forward"), ("bnhd", "forward")):
            assert found[name].startswith(f"la2::{op}: q is sharded over its tokens, Shard(2) over mesh dimension 'cp'")
            assert cp in found[name]
        assert found["backward"].startswith("la2::backward: q is sharded over its tokens")
        assert found["mixed"].startswith("la2::forward: k is sharded over its tokens")
        assert found["head dim"].startswith("la2::forward: q is sharded over its head dim, Shard(3)")
        assert found["state"].startswith("la2::forward: initial_state has placements (Replicate(),)")
        assert found["pool"].startswith("la2::decode: state has placements (Replicate(),)")
        assert found["cp of heads"].startswith("lightning_attention_cp: q has placements (Shard(dim=1),), expected one")
        assert found["cp of both"].startswith("lightning_attention_cp: k is (Shard(dim=1),), expected (Shard(dim=2),)")
        assert found["cp zigzag"].startswith("lightning_attention_cp: q is a DTensor, expected neither")
        assert found["cp group"].startswith("lightning_attention_cp: q is a DTensor, expected neither")
        assert collectives == 0


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("mesh_shape, placements", [((2,), "n"), ((2, 2), "nh"), ((2, 2), "bn")])
def test_shards_of_tokens_go_to_context_parallelism(ranks, mesh_shape, placements, two):
    world = 2 ** len(mesh_shape)
    for error, collectives in ranks(world).run(on_ranks_torch.on_tokens, mesh_shape, placements, two):
        assert error < 1e-12
        assert collectives <= {"all_gather_into_tensor", "all_reduce"}  # states, and gradients of what is the same


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_training_with_fsdp_and_checkpointing(ranks, sharded, recompute):
    state = 2 * 4 * 8 * 8 * 8  # B H D E, float64
    for error, sent in ranks(2).run(on_ranks_torch.training, sharded, recompute):
        assert error < 1e-12
        # Two layers, each once forward (twice when recomputed) and once backward; FSDP2's own go by other names.
        assert sent["all_gather_into_tensor"] == 2 * state * (3 if recompute else 2)
        assert sharded == any("allgather" in name for name in sent)
