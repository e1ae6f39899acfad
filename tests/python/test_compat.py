"""The drop-in functions against the recurrence in float64, in their own argument conventions."""

import inspect
import math

import pytest
import torch

from lightning_attn2_ext import compat, slopes
from lightning_attn2_ext.compat import fla, official, sglang, vllm
from tests.support.cases import Case
from tests.support.tolerance import check_backward, check_forward
from triton_ref import naive


def slope_of(x, values):
    return x.replace(slope=values.to(x.q.device, torch.float32))


# ---- lightning_attn


@pytest.mark.parametrize("dims", [(64, 64), (60, 100), (264, 16), (16, 300)], ids=str)
def test_official(device, dims):
    x = Case(heads=3, batch=2, length=70, key_dim=dims[0], value_dim=dims[1], state_layout=None).make(device)
    x = slope_of(x, torch.tensor([0.0, 0.3, 60.0]))
    for shape in ((3, 1, 1), (3,), (1, 3, 1, 1)):
        check_forward(x, official.lightning_attn_func(x.q, x.k, x.v, x.slope.view(shape)))
    check_forward(x.replace(slope=None), official.lightning_attn_func(x.q, x.k, x.v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_gradients(device, dtype):
    x = Case(heads=3, batch=2, length=70, key_dim=16, value_dim=24, state_layout=None, dtype=dtype).make(device)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    out = official.lightning_attn_func(*leaves, official._build_slope_tensor(3).to(dtype))
    x = slope_of(x, slopes.sala(3).to(dtype).float()).replace(grad_final_state=torch.zeros_like(x.grad_final_state))
    grads = torch.autograd.grad(out, leaves, x.grad_out)
    check_backward(x, (*grads, None, None))


def test_official_slopes():
    for heads in (8, 12):
        built = official._build_slope_tensor(heads)
        assert built.shape == (heads, 1, 1) and built.dtype == torch.float32
        assert built[0].item() == 2.0 ** (-8 / (8 if heads == 8 else 8)) and torch.equal(
            built.flatten(), slopes.sala(heads)
        )
    with pytest.raises(ValueError, match=r"s has shape \(4, 1, 1\), expected one number for 3 heads"):
        official.lightning_attn_func(*torch.ones(3, 1, 3, 2, 8), torch.ones(4, 1, 1))


# ---- flash-linear-attention

HEADS = 4
GAMMA = torch.tensor([0.0, -0.02, -0.5, -60.0])
LAYER = {"layer_idx": 2, "num_layers": 7}
FLA = {  # name: (arguments that choose the decay, its slopes)
    "chunk_simple_gla": ({"g_gamma": GAMMA}, -GAMMA),
    "fused_chunk_simple_gla": ({"g_gamma": GAMMA}, -GAMMA),
    "fused_recurrent_simple_gla": ({"g_gamma": GAMMA}, -GAMMA),
    "chunk_lightning_attn": (LAYER, torch.tensor([8 / HEADS * h * (1 - 2 / 7) for h in range(HEADS)])),
    "fused_recurrent_lightning_attn": (LAYER, torch.tensor([8 / HEADS * h * (1 - 2 / 7) for h in range(HEADS)])),
    "chunk_retention": ({}, torch.tensor([-math.log(1 - 2 ** (-5 - h)) for h in range(HEADS)])),
    "fused_recurrent_retention": ({}, torch.tensor([-math.log(1 - 2 ** (-5 - h)) for h in range(HEADS)])),
}
functions = pytest.mark.parametrize("name", FLA)


def fla_case(name, device="cpu", **changes):
    values = {"heads": HEADS, "batch": 2, "length": 70, "key_dim": 16, "value_dim": 24, "layout": "bnhd"}
    return slope_of(Case(**(values | changes)).make(device), FLA[name][1])


def call(name, x, q, k, v, **options):
    """Its result, head-major as the recurrence has it."""
    out, state = getattr(fla, name)(*(t.transpose(1, 2) for t in (q, k, v)), **FLA[name][0], **options)
    return out.transpose(1, 2), state


def accepts(name, argument):
    return argument in inspect.signature(getattr(fla, name)).parameters


@functions
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_fla(device, name, packed):
    x = fla_case(name, device, **({"lengths": (20, 0, 50)} if packed else {}))
    options = {"initial_state": x.initial_state, "cu_seqlens": x.cu_seqlens, "output_final_state": True}
    check_forward(x.replace(scale=0.3), *call(name, x, x.q, x.k, x.v, scale=0.3, **options))
    check_forward(x.replace(scale=16**-0.5), *call(name, x, x.q, x.k, x.v, **options))
    out, state = call(name, x, x.q, x.k, x.v, cu_seqlens=x.cu_seqlens)
    assert state is None
    check_forward(x.replace(scale=16**-0.5, initial_state=None), out)


@functions
def test_fla_gradients(device, name):
    x = fla_case(name, device).replace(scale=0.5)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
    values = call(name, x, *leaves[:3], scale=0.5, initial_state=leaves[3], output_final_state=True)
    dq, dk, dv, dstate = torch.autograd.grad(values, leaves, x.grads)
    check_backward(x, (dq, dk, dv, None, dstate))


@pytest.mark.parametrize("name", [n for n in FLA if accepts(n, "state_v_first")])
def test_fla_state_v_first(device, name):
    x = fla_case(name, device).replace(scale=0.5)
    initial = x.initial_state.mT.contiguous()
    options = {"scale": 0.5, "initial_state": initial, "output_final_state": True}
    out, state = call(name, x, x.q, x.k, x.v, state_v_first=True, **options)
    assert state.shape == (2, HEADS, 24, 16) and state.is_contiguous()
    check_forward(x, out, state.mT)
    if "recurrent" in name:
        with pytest.warns(DeprecationWarning, match="transpose_state_layout"):
            out, state = call(name, x, x.q, x.k, x.v, transpose_state_layout=True, **options)
        check_forward(x, out, state.mT)


@pytest.mark.parametrize("name", [n for n in FLA if accepts(n, "reverse")])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_fla_reverse(device, name, packed):
    """Each sequence read backwards: the recurrence on it turned round, and its output turned back."""
    x = fla_case(name, device, **({"lengths": (20, 0, 50)} if packed else {})).replace(scale=0.5)
    options = {"initial_state": x.initial_state, "cu_seqlens": x.cu_seqlens, "scale": 0.5, "output_final_state": True}
    out, state = call(name, x, x.q, x.k, x.v, reverse=True, **options)
    edges = [0, 70] if x.cu_seqlens is None else x.cu_seqlens.tolist()

    def turned(t):
        return torch.cat([t[:, :, a:b].flip(2) for a, b in zip(edges, edges[1:])], 2)

    check_forward(x.replace(q=turned(x.q), k=turned(x.k), v=turned(x.v)), turned(out), state)


@pytest.mark.parametrize("dims", [(60, 100), (264, 24), (320, 512)], ids=str)
def test_fla_takes_every_head_dim(dims):
    x = fla_case("chunk_simple_gla", key_dim=dims[0], value_dim=dims[1], length=33, batch=1)
    options = {"initial_state": x.initial_state, "output_final_state": True}
    check_forward(x.replace(scale=dims[0] ** -0.5), *call("chunk_simple_gla", x, x.q, x.k, x.v, **options))
    x = x.replace(scale=0.5)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
    values = call("chunk_simple_gla", x, *leaves[:3], scale=0.5, initial_state=leaves[3], output_final_state=True)
    dq, dk, dv, dstate = torch.autograd.grad(values, leaves, x.grads)
    check_backward(x, (dq, dk, dv, None, dstate))


def test_fla_without_decay():
    x = fla_case("chunk_simple_gla").replace(slope=None, scale=16**-0.5)
    out, state = fla.chunk_simple_gla(
        *(t.transpose(1, 2) for t in (x.q, x.k, x.v)), initial_state=x.initial_state, output_final_state=True
    )
    check_forward(x, out.transpose(1, 2), state)


def test_fla_refusals():
    q = k = v = torch.ones(2, 3, HEADS, 8)
    with pytest.raises(NotImplementedError, match="chunk_simple_gla: g is given"):
        fla.chunk_simple_gla(q, k, v, torch.zeros(2, 3, HEADS))
    with pytest.raises(TypeError, match="head_first"):
        fla.chunk_retention(q, k, v, head_first=True)
    for name in ("chunk_simple_gla", "fused_recurrent_simple_gla", "chunk_lightning_attn", "fused_recurrent_retention"):
        with pytest.raises(TypeError, match=f"{name}: got an unexpected keyword argument 'g_gama'"):
            getattr(fla, name)(q, k, v, **(LAYER if "lightning" in name else {}), g_gama=GAMMA)
    with pytest.raises(ValueError, match=r"q.shape\[0\] is 2, expected 1 with cu_seqlens"):
        fla.chunk_retention(q, k, v, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="expected the number of sequences in cu_seqlens, 2"):
        state = torch.zeros(1, HEADS, 8, 8)
        fla.chunk_retention(q[:1], k[:1], v[:1], initial_state=state, cu_seqlens=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="expected one of them"):
        fla.fused_recurrent_retention(q, k, v, state_v_first=True, transpose_state_layout=True)
    with pytest.raises(ValueError, match="layer_idx is 7"):
        fla.chunk_lightning_attn(q, k, v, 7, 7)
    tuned = fla.chunk_simple_gla(q, k, v, g_gamma=GAMMA, chunk_size=32, cu_seqlens_cpu=torch.tensor([0, 3]))[0]
    assert torch.equal(tuned, fla.chunk_simple_gla(q, k, v, g_gamma=GAMMA)[0])


def test_fla_compiles_without_a_break():
    x = fla_case("chunk_simple_gla")
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in (x.q, x.k, x.v))
    for name, (decay, _) in FLA.items():
        function = getattr(fla, name)
        compiled = torch.compile(lambda *a, f=function, d=decay: f(*a, **d)[0], fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), function(q, k, v, **decay)[0])


# ---- vLLM


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("with_history", [False, True])
def test_vllm_prefill(device, length, with_history):
    x = Case(heads=3, batch=2, length=length, key_dim=16, value_dim=24).make(device)
    x = slope_of(x, torch.tensor([0.05, 0.9, 5.0]))
    if not with_history:
        x = x.replace(initial_state=None)
    before = None if x.initial_state is None else x.initial_state.clone()
    out, states = vllm.lightning_attention(x.q, x.k, x.v, x.slope[:, None, None], kv_history=x.initial_state)
    assert states.shape == (2, 3, math.ceil(length / 256) + 1, 16, 24) and states.dtype == torch.float32
    check_forward(x, out, states[:, :, -1])
    for i in range(1, math.ceil(length / 256)):
        rows = slice(0, 256 * i)
        upto = x.replace(q=x.q[:, :, rows], k=x.k[:, :, rows], v=x.v[:, :, rows])
        check_forward(upto, out[:, :, rows], states[:, :, i])
    if with_history:
        assert torch.equal(x.initial_state, before) and torch.equal(states[:, :, 0], before)


def test_vllm_block_size():
    x = Case(heads=3, batch=1, length=70, key_dim=16, value_dim=16, state_layout=None).make()
    whole = vllm.lightning_attention(x.q, x.k, x.v, x.slope)
    parts = vllm.lightning_attention(x.q, x.k, x.v, x.slope, block_size=32)
    assert whole[1].shape[2] == 2 and parts[1].shape[2] == 4
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1][:, :, -1], parts[1][:, :, -1])


@pytest.mark.parametrize("slots", [[5, 0, 3], [4, -1, 2], [-1, -1, -1], [-7, 5, -1]], ids=str)
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
def test_vllm_decode(device, slots, pool_dtype):
    x = Case(heads=2, batch=3, length=1, key_dim=16, value_dim=16).make(device)
    x = slope_of(x, torch.tensor([0.1, 0.9]))
    generator = torch.Generator().manual_seed(3)
    pool = torch.randn(6, 2, 16, 16, generator=generator).to(device, pool_dtype)
    before, index = pool.clone(), torch.tensor(slots, dtype=torch.int32, device=device)
    out = vllm.linear_decode_forward_triton(x.q, x.k, x.v, pool, x.slope, index)
    assert out.shape == (3, 32)
    want, after = naive.decode(*(t[:, :, 0] for t in (x.q, x.k, x.v)), before, x.slope, state_indices=index)
    live = [i for i, s in enumerate(slots) if s >= 0]
    untouched = [s for s in range(6) if s not in slots]
    assert torch.equal(pool[untouched], before[untouched])
    assert not out[[i for i in range(3) if i not in live]].any()
    # One rounding of the pool on the way back, and a sum of 16 products.
    torch.testing.assert_close(pool.double(), after, rtol=torch.finfo(pool_dtype).eps, atol=1e-6)
    torch.testing.assert_close(out.double(), want.flatten(1), rtol=1e-5, atol=1e-5)


def test_vllm_decode_goes_on_where_prefill_stopped():
    x = Case(heads=2, batch=2, length=300, key_dim=16, value_dim=16, state_layout=None).make()
    x = slope_of(x, torch.tensor([0.1, 0.9]))
    _, states = vllm.lightning_attention(*(t[:, :, :290] for t in (x.q, x.k, x.v)), x.slope)
    pool, rows = states[:, :, -1].contiguous(), []
    for t in range(290, 300):
        step = (y[:, :, t : t + 1] for y in (x.q, x.k, x.v))
        rows.append(vllm.linear_decode_forward_triton(*step, pool, x.slope, torch.arange(2)))
    x.windows = [(290, 300)]
    out = torch.cat((torch.zeros(2, 2, 290, 16), torch.stack(rows, 1).unflatten(-1, (2, 16)).transpose(1, 2)), 2)
    check_forward(x, out)


def test_vllm_refusals():
    q = torch.ones(2, 3, 2, 8)
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 2, 8\), expected \[B, H, 1, D\]"):
        vllm.linear_decode_forward_triton(q, q, q, torch.zeros(2, 3, 8, 8), torch.ones(3), torch.arange(2))
    with pytest.raises(ValueError, match="ed has shape"):
        vllm.lightning_attention(q, q, q, torch.ones(4))


# ---- sglang

LENGTHS = (40, 1, 70, 9)


class Requests:
    """A packed call: tokens, a pool of ten slots, and what the recurrence makes of each request."""

    def __init__(self, device, slots, scales, lengths=LENGTHS, pool_dtype=torch.float32, dim=16, heads=3):
        generator = torch.Generator().manual_seed(4)
        self.q, self.k, self.v = torch.randn(3, sum(lengths), heads, dim, generator=generator).to(device)
        self.pool = torch.randn(10, heads, dim, dim, generator=generator).to(device, pool_dtype)
        self.before = self.pool.clone()
        self.slope = torch.tensor([0.05, 0.9, 6.0], device=device)
        self.edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        self.slots, self.scales, self.scale = slots, scales, dim**-0.5
        self.meta = sglang.SegLaMeta(
            batch_size=len(lengths),
            max_q_length=None,
            q_offsets=torch.tensor(self.edges, dtype=torch.int32, device=device),
            s_offsets=torch.tensor(slots, dtype=torch.int32, device=device),
            q_lengths=None,
            s_scales=torch.tensor(scales, device=device),
        )

    def run(self, **options):
        return sglang.seg_la_fwd(self.q, self.k, self.v, self.pool, self.slope, self.meta, **options)

    def want(self, i, tokens=None):
        """Output [tokens, H, D] and state [H, D, D] of request i after so many of its tokens."""
        a, b = self.edges[i], self.edges[i + 1] if tokens is None else self.edges[i] + tokens
        initial = self.before[self.slots[i]][None] * self.scales[i]
        rows = (t[a:b].transpose(0, 1)[None] for t in (self.q, self.k, self.v))
        out, state = naive.recurrent(*rows, self.slope, initial_state=initial, scale=self.scale)
        return out[0].transpose(0, 1), state[0]


def near(got, want, dtype=torch.float32):
    """Sums of at most 70 terms in float32, and a rounding to dtype."""
    eps = torch.finfo(torch.float32).eps
    limit = (70 * eps + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)) * want.norm()
    assert (got.double() - want).norm() <= limit, f"{(got.double() - want).norm() / want.norm():.1e}"


@pytest.mark.parametrize("slots", [[7, 2, 0, 5], [7, -1, 0, -1], [-1, -1, -1, -1]], ids=str)
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
def test_sglang_prefill(device, slots, pool_dtype):
    r = Requests(device, slots, [1, 0, 0, 1], pool_dtype=pool_dtype)
    out = r.run()
    for i, slot in enumerate(slots):
        rows = out[r.edges[i] : r.edges[i + 1]]
        if slot < 0:
            assert not rows.any()
            continue
        want, state = r.want(i)
        near(rows, want)
        near(r.pool[slot], state, pool_dtype)
    others = [s for s in range(10) if s not in slots]
    assert torch.equal(r.pool[others], r.before[others])


def test_sglang_softmax_scale_and_tokens_behind_the_last(device):
    r = Requests(device, [7, 2, 0, 5], [1, 0, 0, 1])
    r.q, r.k, r.v = (torch.cat((t, torch.ones(6, *t.shape[1:], device=device))) for t in (r.q, r.k, r.v))
    out = r.run(softmax_scale=0.7)
    r.scale = 0.7
    for i in range(4):
        near(out[r.edges[i] : r.edges[i + 1]], r.want(i)[0])
        near(r.pool[r.slots[i]], r.want(i)[1])
    assert out.shape[0] == 126 and not out[120:].any()


def test_sglang_tracked_states(device):
    """At multiples of 32, in between, at the end, nowhere; and none of a request that is padding."""
    r = Requests(device, [7, 2, 0, -1], [1, 0, 1, 1])
    lens = torch.tensor([40, 1, 33, 5], device=device)
    out = r.run(track_lens=lens, track_state_indices=torch.tensor([9, -1, 4, 6], device=device))
    for i in range(3):
        near(out[r.edges[i] : r.edges[i + 1]], r.want(i)[0])
        near(r.pool[r.slots[i]], r.want(i)[1])
    near(r.pool[9], r.want(0)[1])
    near(r.pool[4], r.want(2, 33)[1])
    others = [1, 3, 5, 6, 8]
    assert torch.equal(r.pool[others], r.before[others])


@pytest.mark.parametrize("slots", [[7, 2, 0], [4, -1, 1]], ids=str)
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
def test_sglang_decode(device, slots, pool_dtype):
    r = Requests(device, slots, [1, 1, 1], lengths=(1, 1, 1), pool_dtype=pool_dtype)
    r.meta.s_scales = torch.zeros(3, device=device)  # not heeded: a decode goes on from its state
    out = r.run()
    for i, slot in enumerate(slots):
        if slot < 0:
            assert not out[i].any()
        else:
            near(out[i : i + 1], r.want(i)[0])
            near(r.pool[slot], r.want(i)[1], pool_dtype)


@pytest.mark.parametrize("slots", [[7, 2, 0], [4, -1, 1], [-1, -1, -1]], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_sglang_verification_keeps_every_state(device, slots, cache_dtype):
    r = Requests(device, slots, [1, 1, 1], lengths=(4, 4, 4))
    caches = torch.randn(6, 5, 3, 16, 16, generator=torch.Generator().manual_seed(5)).to(device, cache_dtype)
    before, entries = caches.clone(), [5, 0, 3]
    out = r.run(caches=caches, cache_indices=torch.tensor(entries, dtype=torch.int32, device=device))
    assert torch.equal(r.pool, r.before)
    for i, slot in enumerate(slots):
        rows = out[r.edges[i] : r.edges[i + 1]]
        if slot < 0:
            assert not rows.any() and torch.equal(caches[entries[i]], before[entries[i]])
            continue
        near(rows, r.want(i)[0])
        for step in range(4):
            near(caches[entries[i], step], r.want(i, step + 1)[1], cache_dtype)
    assert torch.equal(caches[:, 4], before[:, 4]) and torch.equal(caches[[1, 2, 4]], before[[1, 2, 4]])


def test_sglang_refusals(device):
    r = Requests(device, [7, 2, 0, 5], [1, 0, 0, 1])
    with pytest.raises(ValueError, match="one of track_lens and track_state_indices"):
        r.run(track_lens=torch.tensor([1, 1, 1, 1]))
    with pytest.raises(ValueError, match="cache_indices is None"):
        r.run(caches=torch.zeros(4, 30, 3, 16, 16))
    r.q, r.k, r.v = r.q[:-1], r.k[:-1], r.v[:-1]
    with pytest.raises(ValueError, match=r"q.shape\[0\] is 119, expected a multiple of the batch size, 4"):
        r.run(caches=torch.zeros(4, 30, 3, 16, 16), cache_indices=torch.arange(4))
    r.k = r.k[:, :1]
    with pytest.raises(ValueError, match="k has shape"):
        r.run()
    r.meta.mask = torch.ones(4, 4)
    with pytest.raises(NotImplementedError, match="seg_la_fwd: meta.mask is given"):
        r.run()


def test_modules_are_found_by_name():
    assert compat.official is official and compat.fla is fla
    with pytest.raises(AttributeError, match="triton"):
        _ = compat.triton
