"""`nn.LightningAttention`: each preset against its model's equations in float64, and every way of feeding it tokens."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lightning_attn2_ext import slopes
from lightning_attn2_ext.nn import PRESETS, LayerState, LightningAttention, Preset
from tests.support.dispatched import Dispatched
from triton_ref import naive

WIDTH, HEADS, LAYERS = 64, 4, 6
#: Of float64 sums of at most a few thousand terms in another order, through a norm.
EXACT = 1e-11
#: The same in float32.
SINGLE = 1e-5

STATE_DICTS = {
    "transnormer": {"qkvu_proj.weight": (256, 64), "out_proj.weight": (64, 64), "lrpe.theta": (4, 1, 16)},
    "minimax": {
        "qkv_proj.weight": (192, 64),
        "output_gate.weight": (64, 64),
        "out_proj.weight": (64, 64),
        "norm.weight": (64,),
    },
    "ring_linear": {
        "query_key_value.weight": (192, 64),
        "g_proj.weight": (64, 64),
        "dense.weight": (64, 64),
        "g_norm.weight": (64,),
        "query_layernorm.weight": (16,),
        "key_layernorm.weight": (16,),
    },
    "retnet": {
        "q_proj.weight": (64, 64),
        "k_proj.weight": (64, 64),
        "v_proj.weight": (128, 64),
        "g_proj.weight": (128, 64),
        "out_proj.weight": (64, 128),
    },
}
SCALES = {"transnormer": 1.0, "minimax": 1.0, "ring_linear": 16**-0.5, "retnet": 16**-0.5}


def layer(preset, dtype=torch.float64, layer_idx=0, seed=0, **more):
    torch.manual_seed(seed)
    module = LightningAttention(WIDTH, HEADS, layer_idx, LAYERS, preset=preset, dtype=dtype, **more)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def tokens(batch, length, dtype=torch.float64, seed=1):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def rms(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turn(x, angles, pairs):
    """Multiply the complex numbers that `pairs` picks out of the last dimension by exp(i angle)."""
    first, second = pairs
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles)
    x = x.clone()
    x[..., first], x[..., second] = z.real, z.imag
    return x


def reference(module, preset, x):
    """The mixer written down from the model's description, on the recurrence; x [B, N, W] in float64."""
    w = {n: p.double() for n, p in module.state_dict().items()}
    b, n, _ = x.shape
    d = WIDTH // HEADS
    position = torch.arange(n, dtype=torch.float64)[:, None, None]
    if preset == "transnormer":
        q, k, v, u = (y.view(b, n, HEADS, d) for y in (x @ w["qkvu_proj.weight"].T).chunk(4, -1))
        q, k = F.silu(q), F.silu(k)
        if module.layer_idx == 0:
            angle = position * w["lrpe.theta"].view(1, HEADS, d)
            q, k = (torch.cat((y * angle.cos(), y * angle.sin()), -1) for y in (q, k))
    elif preset == "minimax":
        q, k, v = F.silu(x @ w["qkv_proj.weight"].T).view(b, n, HEADS, 3, d).unbind(3)
    elif preset == "ring_linear":
        q, k, v = (y.view(b, n, HEADS, d) for y in (x @ w["query_key_value.weight"].T).chunk(3, -1))
        q, k = rms(q) * w["query_layernorm.weight"], rms(k) * w["key_layernorm.weight"]
        angle = position * 6e6 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        q, k = (turn(y, angle.expand(b, n, HEADS, 4), (slice(0, 4), slice(4, 8))) for y in (q, k))
    else:
        q, k = ((x @ w[f"{p}_proj.weight"].T).view(b, n, HEADS, d) for p in "qk")
        v = (x @ w["v_proj.weight"].T).view(b, n, HEADS, 2 * d)
        angle = position * 1e4 ** -torch.linspace(0, 1, d // 2, dtype=torch.float64)
        every = (slice(0, None, 2), slice(1, None, 2))
        q, k = (turn(y, angle.expand(b, n, HEADS, d // 2), every) for y in (q, k))
    o, _ = naive.recurrent(*(y.transpose(1, 2) for y in (q, k, v)), module.slope, scale=SCALES[preset])
    o = o.transpose(1, 2)
    if preset == "transnormer":
        return (u.reshape(b, n, -1) * rms(o.flatten(2))) @ w["out_proj.weight"].T
    if preset == "minimax":
        gate = torch.sigmoid(x @ w["output_gate.weight"].T)
        return (gate * rms(o.flatten(2)) * w["norm.weight"]) @ w["out_proj.weight"].T
    if preset == "ring_linear":
        o = rms(o.reshape(b, n, 4, -1)).flatten(2) * w["g_norm.weight"]
        return (torch.sigmoid(x @ w["g_proj.weight"].T) * o) @ w["dense.weight"].T
    return (F.silu(x @ w["g_proj.weight"].T) * rms(o).flatten(2)) @ w["out_proj.weight"].T


def assert_near(got, want, tolerance=EXACT):
    assert got.shape == want.shape
    assert (got - want).norm() <= tolerance * want.norm(), f"{((got - want).norm() / want.norm()).item():.1e}"


presets = pytest.mark.parametrize("preset", PRESETS)


@presets
def test_preset_is_its_model(preset):
    module, x = layer(preset), tokens(2, 70)
    assert {n: tuple(p.shape) for n, p in module.state_dict().items()} == STATE_DICTS[preset]
    assert_near(module(x), reference(module, preset, x))


@presets
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_gradients_and_values_without_are_those_of_the_model(preset, layer_idx):
    """The operator goes another way where no gradient is wanted."""
    module, x = layer(preset, layer_idx=layer_idx), tokens(2, 30).requires_grad_()
    want, weights = reference(module, preset, x), tokens(2, 30, seed=3)
    with torch.no_grad():
        assert_near(module(x), want)
    got, want = (torch.autograd.grad((y * weights).sum(), [x])[0] for y in (module(x), want))
    assert_near(got, want, 1e-9)


NORMS = dict(PRESETS["minimax"].names) | {"q_norm": "q_norm", "k_norm": "k_norm"}


@pytest.mark.parametrize(
    "preset, options, left",
    [
        ("minimax", {}, "qkv"),
        ("minimax", {"activated": "vk"}, "kv"),
        ("minimax", {"rotary": "half"}, "v"),
        ("minimax", {"qk_norm": True, "names": NORMS}, "v"),
        ("transnormer", {"layer_idx": 0}, ""),
        ("transnormer", {"layer_idx": 1}, "qk"),
        ("ring_linear", {}, ""),
        ("retnet", {"activated": "q"}, ""),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else x,
)
@torch.no_grad()
def test_what_the_operator_activates(preset, options, left):
    """What nothing stands before, unless there is padding; the rest by itself, and nothing twice."""
    module, x = layer(preset, gate="sigmoid", **options), tokens(2, 9)
    state, mask = module.new_state(2), torch.ones(2, 9, dtype=torch.bool)
    calls = {
        "whole": {},
        "packed": {"cu_seqlens": torch.tensor([0, 4, 9])},
        "state": {"state": state},
        "step": {"state": state},
        "padding": {"attention_mask": mask},
        "padding, state": {"attention_mask": mask, "state": state},
        "padding, step": {"attention_mask": mask[:, :1], "state": state},
    }
    for name, more in calls.items():
        rows, length = 1 if "packed" in name else 2, 1 if "step" in name else 9
        with Dispatched() as seen:
            module(x[:rows, :length], **more)
        (given,) = seen.of("la2.")
        inside = "" if name in ("padding", "padding, state") else left
        assert given.get("silu", 0) == sum(bit for p, bit in (("q", 1), ("k", 2), ("v", 4)) if p in inside), name
        assert len(seen.of("aten.silu")) == len(module.preset.activated) - len(inside), name


@pytest.mark.parametrize("preset, kind", [(p, PRESETS[p].slope) for p in PRESETS])
def test_slope_is_the_formula_of_the_layer(preset, kind):
    module = layer(preset, layer_idx=3)
    assert torch.equal(module.slope, slopes.slopes(kind, HEADS, 3, LAYERS))
    assert module.slope.dtype == torch.float32
    assert module.bfloat16().slope.dtype == torch.float32
    assert torch.equal(copy.deepcopy(module).slope, module.slope)
    assert "slope" not in module.state_dict()


def test_slope_survives_meta_device():
    with torch.device("meta"):
        module = LightningAttention(WIDTH, HEADS, 1, LAYERS)
    assert torch.equal(module.slope, slopes.minimax(HEADS, 1, LAYERS))
    module = module.to_empty(device="cpu")
    assert torch.equal(module.slope, slopes.minimax(HEADS, 1, LAYERS))


def test_transnormer_rotates_in_its_first_layer_only():
    module = layer("transnormer", layer_idx=1)
    assert "lrpe.theta" not in module.state_dict() and module.key_dim == 16
    assert layer("transnormer").key_dim == 32


def test_original_buffers_are_no_obstacle():
    module = layer("minimax")
    saved = {n: p.clone() for n, p in module.state_dict().items()} | {"slope_rate": torch.ones(HEADS, 1, 1)}
    other = layer("minimax", seed=5)
    other.load_state_dict(saved)
    assert torch.equal(other(tokens(1, 9)), module(tokens(1, 9)))
    with pytest.raises(RuntimeError, match="nobody_knows"):
        other.load_state_dict(saved | {"nobody_knows": torch.ones(1)})


@presets
@pytest.mark.parametrize("cuts", [(50, 1, 1, 18), (1,) * 70], ids=["chunks", "decode"])
def test_pieces_with_a_state_equal_the_whole(preset, cuts):
    module, x = layer(preset), tokens(2, 70)
    state = module.new_state(2)
    address = state.state.data_ptr()
    with torch.no_grad():
        whole = module(x)
        pieces = [module(piece, state=state) for piece in x.split(cuts, 1)]
    assert_near(torch.cat(pieces, 1), whole)
    assert state.length.tolist() == [70, 70] and state.state.data_ptr() == address


@presets
def test_packed_sequences_equal_separate_ones(preset):
    module, x = layer(preset), tokens(1, 40)
    edges = [0, 7, 7, 30, 40]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    state = module.new_state(4)
    with torch.no_grad():
        packed = module(x, cu_seqlens=cu_seqlens)
        first = module(x, cu_seqlens=cu_seqlens, state=state)
        again = module(x, cu_seqlens=cu_seqlens, state=state)
        for i, (a, b) in enumerate(zip(edges, edges[1:])):
            own = module.new_state(1)
            assert_near(packed[:, a:b], module(x[:, a:b]))
            assert_near(first[:, a:b], module(x[:, a:b], state=own))
            assert_near(again[:, a:b], module(x[:, a:b], state=own))
            assert_near(state.state[i], own.state[0])
    assert state.length.tolist() == [14, 0, 46, 20]


PADDINGS = {
    "left": [(5, 30), (0, 30), (29, 30)],
    "right": [(0, 4), (0, 30), (0, 0)],
    "both": [(3, 20), (1, 30), (0, 12)],
}


@presets
@pytest.mark.parametrize("side", PADDINGS)
def test_padding_is_as_if_it_were_not_there(preset, side):
    """With and without a state, with one that has tokens already, and in the step behind."""
    module, x, spans = layer(preset), tokens(3, 30), PADDINGS[side]
    mask = torch.zeros(3, 30, dtype=torch.int64)
    for row, (a, b) in enumerate(spans):
        mask[row, a:b] = 1
    next_mask = torch.tensor([[1], [0], [1]])
    state, before = module.new_state(3), tokens(3, 8, seed=2)
    with torch.no_grad():
        stateless = module(x, attention_mask=mask)
        module(before, state=state)
        out = module(x, attention_mask=mask, state=state)
        step = module(x[:, :1], attention_mask=next_mask, state=state)
        for row, (a, b) in enumerate(spans):
            own, xs = module.new_state(1), x[row : row + 1]
            assert_near(stateless[row : row + 1, a:b], module(xs[:, a:b]))
            module(before[row : row + 1], state=own)
            assert_near(out[row : row + 1, a:b], module(xs[:, a:b], state=own))
            if next_mask[row]:
                assert_near(step[row : row + 1], module(xs[:, :1], state=own))
            assert_near(state.state[row], own.state[0])
            assert state.length[row] == own.length[0]
    for result in (stateless, out):
        assert not result[mask == 0].any()
    assert not step[1].any()


@presets
def test_gradients_through_padding_and_pieces(preset):
    module, x = layer(preset), tokens(2, 24)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, 20:] = False
    weights = torch.where(mask[:, :, None], tokens(2, 24, seed=3), 0)
    parameters = list(module.parameters())
    want = torch.autograd.grad((module(x, attention_mask=mask) * weights).sum(), parameters)
    state = module.new_state(2)
    pieces = [module(a, attention_mask=m, state=state) for a, m in zip(x.split(9, 1), mask.split(9, 1))]
    got = torch.autograd.grad((torch.cat(pieces, 1) * weights).sum(), parameters)
    for a, b in zip(got, want):
        assert_near(a, b, 1e-9)
    assert state.state.requires_grad and not state.detach_().state.requires_grad


def test_one_token_with_gradients_of_values_alone():
    """The decode operator has no gradient, so that it must not be used here."""
    module, x = layer("retnet").requires_grad_(False), tokens(2, 3)
    module.v_proj.requires_grad_(True)
    state, plain = module.new_state(2), module.new_state(2)
    out = torch.cat([module(piece, state=state) for piece in x.split(1, 1)], 1)
    (got,) = torch.autograd.grad(out.square().sum(), [module.v_proj.weight])
    (want,) = torch.autograd.grad(module(x, state=plain).square().sum(), [module.v_proj.weight])
    assert_near(got, want, 1e-9)


def test_zeros_of_the_mask_between_tokens_age_the_state():
    """In this preset a zero input makes zero keys and values."""
    module, x = layer("minimax"), tokens(2, 20)
    mask = torch.ones(2, 20)
    mask[0, 7:10], mask[1, :3] = 0, 0
    state, own = module.new_state(2), module.new_state(1)
    with torch.no_grad():
        out = module(x, attention_mask=mask, state=state)
        want = module(torch.where(mask[:1, :, None] > 0, x[:1], 0), state=own)
        assert_near(module(x, attention_mask=mask)[0, 10:], want[0, 10:])
    assert_near(out[0, 10:], want[0, 10:])
    assert_near(state.state[0], own.state[0])
    assert not out[0, 7:10].any()


def test_padding_receives_no_gradient():
    module, x = layer("minimax"), tokens(1, 9).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]])
    module(x, attention_mask=mask).square().sum().backward()
    assert x.grad[0, 2:7].all(-1).all() and not x.grad[0, [0, 1, 7, 8]].any()


@presets
def test_position_ids_replace_the_count(preset):
    module, x = layer(preset), tokens(1, 12)
    rotates = preset != "minimax"
    shifted = module(x, position_ids=torch.arange(12)[None] + 5)
    stretched = module(x, position_ids=torch.arange(12)[None] * 3)
    assert_near(shifted, module(x), 1e-9)  # relative embeddings: only differences count
    assert torch.equal(stretched, module(x)) != rotates


def test_beam_search_moves_states():
    module, x = layer("ring_linear"), tokens(3, 10)
    state = module.new_state(3)
    with torch.no_grad():
        module(x, state=state)
        beams = torch.tensor([2, 2, 0, 1])
        picked = state.select(beams)
        kept = state.clone()
        state.reorder_(torch.tensor([1, 0, 0]))
    assert torch.equal(picked.state, kept.state[beams]) and torch.equal(state.state, kept.state[[1, 0, 0]])
    assert not state.reset_().state.any() and not state.length.any()
    assert isinstance(picked, LayerState) and "3" in repr(kept)


@presets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_narrow_parameters(preset, dtype):
    """Both stay within a few roundings of the narrow type, and the states float32."""
    wide, x = layer(preset, torch.float32), tokens(2, 40, torch.float32)
    want = wide(x)
    with torch.autocast("cpu", dtype):
        cast = wide(x)
    narrow = copy.deepcopy(wide).to(dtype)
    state = narrow.new_state(2)
    with torch.no_grad():
        pieces = [narrow(p, state=state) for p in x.to(dtype).split((38, 1, 1), 1)]
    assert cast.dtype == dtype and state.state.dtype == torch.float32
    # Eight roundings in a row, each of half an ulp: projections in and out, activation, q and k, operator, norm, gate.
    tolerance = 8 * torch.finfo(dtype).eps
    assert_near(cast.float(), want, tolerance)
    assert_near(torch.cat(pieces, 1).float(), want, tolerance)


@presets
def test_activation_checkpointing(preset):
    from torch.utils.checkpoint import checkpoint

    module, x = layer(preset), tokens(2, 20).requires_grad_()
    inputs = [x, *module.parameters()]
    want = torch.autograd.grad(module(x).square().sum(), inputs)
    for use_reentrant in (False, True):
        out = checkpoint(module, x, use_reentrant=use_reentrant)
        if use_reentrant:
            module.zero_grad()
            out.square().sum().backward()
            got = [t.grad for t in inputs]
        else:
            got = torch.autograd.grad(out.square().sum(), inputs)
        for a, b in zip(got, want):
            assert torch.equal(a, b)


def test_wrong_arguments_are_named():
    x = tokens(1, 4)
    with pytest.raises(ValueError, match="preset is 'mamba', expected one of transnormer"):
        LightningAttention(WIDTH, HEADS, preset="mamba")
    with pytest.raises(ValueError, match="unknown argument 'gates'"):
        LightningAttention(WIDTH, HEADS, gates="silu")
    with pytest.raises(ValueError, match="gate is 'tanh', expected one of none"):
        LightningAttention(WIDTH, HEADS, gate="tanh")
    with pytest.raises(ValueError, match="hidden_size is 64, expected a multiple of num_heads, 3"):
        LightningAttention(WIDTH, 3)
    with pytest.raises(ValueError, match="head_dim is 4, expected a multiple of 8"):
        LightningAttention(WIDTH, 16)
    with pytest.raises(ValueError, match="layer_idx is 6"):
        LightningAttention(WIDTH, HEADS, 6, 6)
    with pytest.raises(ValueError, match="attention_mask and cu_seqlens"):
        layer("minimax")(x, attention_mask=torch.ones(1, 4), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="with_gate"):
        LightningAttention(WIDTH, HEADS, preset="retnet", projections="with_gate")
    with pytest.raises(RuntimeError, match="la2::forward_with_state: initial_state"):
        module = layer("minimax")
        module(x, state=module.new_state(2))


def test_a_preset_of_ones_own():
    sala = Preset(
        slope="sala",
        names={
            "qkv": "qkv",
            "gate": "z_proj",
            "out": "o_proj",
            "norm": "o_norm",
            "q_norm": "q_norm",
            "k_norm": "k_norm",
        },
        activated="",
        qk_norm=True,
        rotary="half",
        scale="rsqrt",
    )
    module = LightningAttention(WIDTH, HEADS, 2, LAYERS, preset=sala, head_dim=24, dtype=torch.float64)
    assert module(tokens(2, 5)).shape == (2, 5, WIDTH)
    assert module.z_proj.weight.shape == (96, 64) and torch.equal(module.slope, slopes.sala(HEADS))
    assert "slope='sala'" in repr(module)
    plain = LightningAttention(WIDTH, HEADS, preset=sala, gate="none", dtype=torch.float64)
    assert not hasattr(plain, "z_proj") and plain(tokens(1, 3)).shape == (1, 3, WIDTH)


@presets
def test_float32_is_near_float64_on_each_device(device, preset):
    """Whole, packed, padded with a state, and decoded."""
    module, x = layer(preset, torch.float32), tokens(2, 300)
    want = reference(module, preset, x)
    module, x = module.to(device), x.float().to(device)
    assert module.slope.device.type == device
    mask = torch.ones(2, 280, dtype=torch.int64, device=device)
    mask[1, :100] = 0
    state = module.new_state(2)
    with torch.no_grad():
        assert_near(module(x).double().cpu(), want, SINGLE)
        pieces = [module(x[:, :280], state=state), *(module(x[:, i : i + 1], state=state) for i in range(280, 300))]
        assert_near(torch.cat(pieces, 1).double().cpu(), want, SINGLE)
        cu_seqlens = torch.tensor([0, 300, 600], device=device)
        packed = module(x.flatten(0, 1)[None], cu_seqlens=cu_seqlens)
        assert_near(packed.unflatten(1, (2, 300))[0].double().cpu(), want, SINGLE)
        shifted = torch.cat((x[1:, :100], x[1:, :180]), 1)  # 100 rows of padding, then the first 180 tokens
        out = module(torch.cat((x[:1, :280], shifted)), attention_mask=mask, state=state.reset_())
        assert_near(out[0].double().cpu(), want[0, :280], SINGLE)
        assert_near(out[1, 100:].double().cpu(), want[1, :180], SINGLE)
        assert not out[1, :100].any() and state.length.tolist() == [280, 180]
