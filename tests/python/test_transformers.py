"""transformers' MiniMax on this package's operator, against the same weights in transformers' own code."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")

from transformers import AutoModelForCausalLM, MiniMaxConfig, MiniMaxForCausalLM  # noqa: E402
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention  # noqa: E402
from transformers.monkey_patching import get_patch_mapping, register_patch_mapping  # noqa: E402

from lightning_attn2_ext import slopes  # noqa: E402
from lightning_attn2_ext.integrations import transformers as integration  # noqa: E402
from tests.support.dispatched import Dispatched  # noqa: E402
from tests.support.tolerance import one_thread  # noqa: E402

#: Asked for by the project: logits of float32 models.
LOGITS = 1e-5


def config(**changes):
    values = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "intermediate_size": 96,
        "num_local_experts": 2,
        "vocab_size": 101,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return MiniMaxConfig(**(values | changes))


@pytest.fixture(autouse=True)
def single_thread_and_no_mapping():
    with one_thread():
        yield
    integration.unpatch()
    assert not get_patch_mapping()


#: transformers' default starts with softmax attention, MiniMax-Text-01 with Lightning Attention.
LAYOUTS = {
    "softmax first": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
    "lightning first": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def original(layout, device):
    torch.manual_seed(0)
    return MiniMaxForCausalLM(config(layer_types=LAYOUTS[layout])).eval().to(device)


@pytest.fixture(scope="module")
def patched(original):
    model = copy.deepcopy(original)
    assert integration.patch(model) == model.config.layer_types.count("linear_attention")
    return model


def lightning_layers(model):
    return [m for m in model.modules() if isinstance(m, MiniMaxLightningAttention)]


def states_of(cache):
    return [s for s in cache.linear_cache if isinstance(s, torch.Tensor)]


def prompt(batch, length, seed=1, device="cpu"):
    return torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def greedy(model, ids, new, **options):
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


@torch.no_grad()
def test_prefill_of_1000_tokens(original, patched):
    ids = prompt(2, 1000, device=patched.device)
    want, got = original(ids).logits, patched(ids).logits
    assert (got - want).abs().max() <= LOGITS and want.abs().max() > 0.1


@torch.no_grad()
def test_64_generated_tokens(original, patched):
    want, got = (greedy(m, prompt(2, 50, device=m.device), 64) for m in (original, patched))
    assert torch.equal(got.sequences, want.sequences) and got.sequences.shape == (2, 114)
    assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() <= LOGITS
    states = states_of(got.past_key_values)
    assert len(states) == len(lightning_layers(patched)) and all(s.dtype == torch.float32 for s in states)
    assert got.past_key_values.get_seq_length() == 113


class Twice(torch.nn.SiLU):
    """Not what it is derived from."""

    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("act, bits", [("silu", 7), ("swish", 7), ("gelu", 0), (Twice(), 0)], ids=str)
def test_activation(act, bits):
    """Prefill, a step behind it, and both with a mask: the values are the original's, whichever activation there is,
    and SiLU is the operator's own where there is no mask."""
    torch.manual_seed(0)
    original = MiniMaxLightningAttention(config(hidden_act=act if isinstance(act, str) else "silu"), 2)
    if not isinstance(act, str):
        original.act_fn = act
    patched = copy.deepcopy(original)
    integration.patch(patched)
    x, caches = torch.randn(2, 30, 64), [MiniMaxCache(), MiniMaxCache()]
    for piece, mask in ((x[:, :29], None), (x[:, 29:], None), (x, torch.ones(2, 30))):
        # The original wants a block of a prompt without a cache.
        own = caches if mask is None else [None, None]
        want = original(piece, None, mask, own[0])
        with Dispatched() as seen:
            got = patched(piece, None, mask, own[1])
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= LOGITS * b.norm()
        (given,) = seen.of("la2.")
        assert given.get("silu", 0) == (bits if mask is None else 0)
        assert not seen.of("aten.silu") or mask is not None or not bits


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(300,), (100, 1, 150, 49), (1, 299)], ids=str)
def test_a_cached_prompt_goes_on_in_pieces(patched, pieces):
    ids, cache, outs = prompt(2, 300, device=patched.device), MiniMaxCache(), []
    for piece in ids.split(pieces, 1):
        outs.append(patched(piece, past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(outs, 1) - patched(ids).logits).abs().max() <= LOGITS
    whole = patched(ids).past_key_values
    assert cache.get_seq_length() == whole.get_seq_length() == 300
    for a, b in zip(states_of(cache), states_of(whole), strict=True):
        assert (a - b).norm() <= LOGITS * b.norm()


@torch.no_grad()
def test_left_padding(original, patched, layout):
    ids = prompt(3, 40, device=patched.device)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 7, 33)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    got = greedy(patched, ids, 8, attention_mask=mask)
    if layout == "softmax first":  # else the original masks all but one position, which torch's CUDA kernels refuse
        want = greedy(original, ids, 8, attention_mask=mask)
        assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() <= LOGITS
    for row, pad in enumerate((0, 7, 33)):
        alone = greedy(patched, ids[row : row + 1, pad:], 8)
        assert (torch.stack(alone.logits)[:, 0] - torch.stack(got.logits)[:, row]).abs().max() <= LOGITS


@torch.no_grad()
def test_padding_does_not_age_a_cached_state(patched):
    """On both sides, for tokens behind a prompt: what the layer gives each row is what it gives that row alone."""
    layer = lightning_layers(patched)[0]
    x = torch.randn(3, 30, 64, generator=torch.Generator().manual_seed(2)).to(patched.device)
    first, second = x.split((12, 18), 1)
    mask = torch.zeros(3, 18, dtype=torch.int64, device=patched.device)
    spans = ((0, 18), (5, 18), (2, 11))
    for row, (a, b) in enumerate(spans):
        mask[row, a:b] = 1
    cache = MiniMaxCache()
    layer(first, past_key_values=cache)
    out, _ = layer(second, attention_mask=mask, past_key_values=cache)
    for row, (a, b) in enumerate(spans):
        own = MiniMaxCache()
        layer(first[row : row + 1], past_key_values=own)
        want, _ = layer(second[row : row + 1, a:b], past_key_values=own)
        assert (out[row, a:b] - want[0]).abs().max() <= LOGITS
        a, b = states_of(cache)[0][row], states_of(own)[0][0]
        assert (a - b).norm() <= LOGITS * b.norm()


@torch.no_grad()
def test_beam_search_is_that_without_a_cache(original, patched):
    """transformers' own cache leaves the states where they were when beams move: its search is another one."""
    ids = prompt(2, 50, device=patched.device)
    options = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False}
    exact = original.generate(ids, use_cache=False, **options)
    assert torch.equal(patched.generate(ids, use_cache=True, **options), exact)
    reordered = original.generate(ids, use_cache=True, **options)
    assert not torch.equal(reordered, exact), "transformers moves the states now: _Cache can go"


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32(device):
    """Both ways to a bfloat16 model: converted, and built in that dtype, where transformers computes slopes in it."""
    torch.manual_seed(0)
    heads = 64
    shape = config(hidden_size=128, num_attention_heads=heads, head_dim=8, num_key_value_heads=heads)
    exact = MiniMaxForCausalLM(shape).eval().to(device)
    ids = prompt(2, 600, device=device)
    want = exact(ids).logits
    built = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval().to(device)
    built.load_state_dict({n: p.bfloat16() for n, p in exact.state_dict().items() if "_decay" not in n}, strict=False)
    for narrow in (copy.deepcopy(exact).bfloat16(), built):
        theirs = (narrow(ids).logits.float() - want).norm()
        integration.patch(narrow)
        ours = (narrow(ids).logits.float() - want).norm()
        assert ours <= theirs and ours > 0


def test_gradients(original, patched):
    ids = prompt(2, 70, device=patched.device)
    grads = []
    for model in (original, patched):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[0].items():
        assert (grads[1][name] - want).norm() <= LOGITS * want.norm().clamp(min=1e-3), name


def test_new_models_through_the_mapping(original, tmp_path):
    original.save_pretrained(tmp_path)
    integration.patch()
    integration.patch()  # again is no error
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(original.device)
    built = AutoModelForCausalLM.from_config(original.config)
    integration.unpatch()
    assert integration.is_patched(loaded) and integration.is_patched(built)
    assert loaded.state_dict().keys() == original.state_dict().keys()
    plain = AutoModelForCausalLM.from_config(original.config)
    assert not integration.is_patched(plain)
    collected = [m(prompt(1, 9), output_attentions=True, use_cache=False).attentions for m in (plain, built)]
    assert len(collected[0]) == len(collected[1]) == len(lightning_layers(plain))
    ids = prompt(1, 80, device=original.device)
    with torch.no_grad():
        assert (loaded(ids).logits - original(ids).logits).abs().max() <= LOGITS
        assert torch.equal(copy.deepcopy(loaded)(ids).logits, loaded(ids).logits)


def test_unpatch_a_model(original):
    model, number = copy.deepcopy(original), len(lightning_layers(original))
    assert integration.patch(model) == integration.unpatch(model) == number and integration.unpatch(model) == 0
    ids = prompt(1, 30, device=model.device)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert all(type(m) is not integration.LightningMiniMaxAttention for m in model.modules())


@torch.no_grad()
def test_a_cache_by_any_name(patched):
    """transformers 5.24 renamed it; under a third name it would be left out and the result would look right."""
    layer = lightning_layers(patched)[0]
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3)).to(patched.device)
    first, second = x.split((5, 4), 1)
    whole = layer(x)[0][:, 5:]
    for name in ("cache", "past_key_values"):
        caches = {name: MiniMaxCache()}
        layer(first, **caches)
        assert (layer(second, **caches)[0] - whole).abs().max() <= LOGITS
    with pytest.raises(TypeError, match="memory is a cache, expected it as cache or past_key_values"):
        layer(first, memory=MiniMaxCache())


@torch.no_grad()
def test_a_patched_model_reads_the_cache_of_the_original():
    original = MiniMaxForCausalLM(config(layer_types=LAYOUTS["softmax first"])).eval()
    ids, cache = prompt(1, 40), MiniMaxCache()
    original(ids[:, :30], past_key_values=cache, use_cache=True)
    want = original(ids).logits[:, 30:]
    integration.patch(original)
    assert (original(ids[:, 30:], past_key_values=cache, use_cache=True).logits - want).abs().max() <= LOGITS


def test_slopes_are_float32_and_chosen():
    model = MiniMaxForCausalLM(config(num_attention_heads=6, num_key_value_heads=2)).bfloat16()
    layer = model.model.layers[2].self_attn
    found = {}
    for kind in ("hf_minimax", "minimax", "buffer"):
        integration.patch(model, slopes=kind)
        found[kind] = layer.slope(torch.device("cpu"), torch.float32)
        assert found[kind].dtype == torch.float32 and found[kind].shape == (6,)
    assert torch.equal(found["hf_minimax"], slopes.hf_minimax(6, 2, 4))
    assert torch.equal(found["minimax"], slopes.minimax(6, 2, 4))
    assert torch.equal(found["buffer"], layer.slope_rate.flatten().float())
    assert not torch.equal(found["buffer"], found["hf_minimax"])


def test_refusals():
    with pytest.raises(ValueError, match="slopes is 'alibi', expected one of hf_minimax"):
        integration.patch(slopes="alibi")
    with pytest.raises(ValueError, match="Linear holds no MiniMaxLightningAttention"):
        integration.patch(torch.nn.Linear(2, 2))

    class Other(MiniMaxLightningAttention):
        pass

    register_patch_mapping({"MiniMaxLightningAttention": Other})
    try:
        with pytest.raises(ValueError, match="is mapped to .*Other already"):
            integration.patch()
        integration.unpatch()
        assert get_patch_mapping() == {"MiniMaxLightningAttention": Other}
    finally:
        transformers.monkey_patching.clear_patch_mapping()


def test_slopes_of_layers_compiled_before_they_run():
    """Are in their graphs, each layer's own, and are not made in every call."""
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op.startswith("call")})
        return graph

    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    for layer_idx in range(3):
        torch.manual_seed(layer_idx)
        layer = MiniMaxLightningAttention(config(), layer_idx).requires_grad_(False)
        integration.patch(layer)
        found = torch.compile(copy.deepcopy(layer), backend=keep, fullgraph=True)(x, None, None, None)
        for got, want in zip(found, layer(x, None, None, None), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert len(graphs) == 3
    assert not [name for graph in graphs for name in graph if "method tensor" in name or "slopes" in name]
