"""A decode step past torch's dispatcher: the operator's bits, and only where nobody loses anything by it."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_attn2_ext
from lightning_attn2_ext import _direct, lightning_attention_decode
from tests.support.pools import bits, pool_of

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROWS, HEADS, D, E, SLOTS = 3, 2, 40, 24, 5

pytestmark = pytest.mark.skipif(
    _direct.decode is None, reason="built without Python's headers, or torch has no DLPack exchange API"
)


class Step:
    """Arguments of a step. packed: q, k and v are views of one tensor."""

    def __init__(self, device, *, dtype=BF16, pool="kv", pool_dtype=FP32, index=torch.int32, slope="heads", rows=ROWS,
                 packed=True):  # fmt: skip
        generator = torch.Generator().manual_seed(rows)
        qkv = torch.randn(rows, HEADS, 2 * D + E, generator=generator).to(device, dtype)
        self.q, self.k, self.v = qkv.split((D, D, E), -1)
        if not packed:
            self.q, self.k, self.v = (t.contiguous() for t in (self.q, self.k, self.v))
        self.slope = {"none": None, "heads": torch.rand(HEADS), "rows": torch.rand(rows, HEADS)}[slope]
        self.slope = None if self.slope is None else self.slope.to(device)
        slots = SLOTS if index else rows
        self.state = pool_of((slots, HEADS, D, E), pool, pool_dtype, device)
        self.state.copy_(torch.randn(self.state.shape, generator=generator))
        self.indices = None if index is None else torch.tensor([4, -1, 0], dtype=index, device=device)[:rows]

    def copy(self):
        other = object.__new__(Step)
        other.__dict__.update(self.__dict__)
        other.state = torch.empty_strided(self.state.shape, self.state.stride(), dtype=self.state.dtype,
                                          device=self.state.device).copy_(self.state)  # fmt: skip
        return other

    def args(self, scale=0.5, silu=0):
        return self.q, self.k, self.v, self.state, self.slope, self.indices, scale, silu

    def by_operator(self, scale=0.5, silu=0):
        return torch.ops.la2.decode(
            self.q, self.k, self.v, self.state, self.slope, state_indices=self.indices, scale=scale, silu=silu
        )

    def by_function(self, **options):
        return lightning_attention_decode(
            self.q, self.k, self.v, self.state, self.slope, state_indices=self.indices, **options
        )


def check_taken(step, silu=0, other=None):
    """The result, its format, the states and their versions are the operator's."""
    other = other or step.copy()
    before = step.state._version, other.state._version
    want = other.by_operator(silu=silu)
    out = _direct.decode(*step.args(silu=silu))
    assert out is not None
    assert out.dtype == want.dtype and out.stride() == want.stride() and type(out) is torch.Tensor
    assert torch.equal(bits(out), bits(want)) and torch.equal(bits(step.state), bits(other.state))
    assert step.state._version - before[0] == other.state._version - before[1] == 1


def check_declined(step, has_memory=True, **options):
    """Nothing is done."""
    if not has_memory:
        assert _direct.decode(*step.args(**options)) is None
        return
    before, version = step.state.detach().clone(), None if step.state.is_inference() else step.state._version
    assert _direct.decode(*step.args(**options)) is None
    assert torch.equal(bits(step.state.detach()), bits(before))
    assert version is None or step.state._version == version


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("pool", ("kv", "vk", "padded"))
@pytest.mark.parametrize("pool_dtype", (FP32, BF16))
def test_bits_of_the_operator(device, dtype, pool, pool_dtype):
    for index in (None, torch.int32, torch.int64):
        for slope in ("none", "heads", "rows"):
            for packed in (True, False):
                check_taken(
                    Step(device, dtype=dtype, pool=pool, pool_dtype=pool_dtype, index=index, slope=slope, packed=packed)
                )
    check_taken(Step(device, dtype=dtype, pool=pool, pool_dtype=pool_dtype, rows=1))


@pytest.mark.gpu
@pytest.mark.parametrize("silu", range(8))
def test_silu(silu):
    check_taken(Step("cuda", index=None), silu)


def test_silu_is_not_the_cpu_kernels_work():
    check_declined(Step("cpu"), silu=7)


def test_grad_modes(device):
    with torch.no_grad():
        step = Step(device)
        step.q = step.q.clone().requires_grad_()
        check_taken(step)
    with torch.inference_mode():
        check_taken_in_inference(Step(device))
        out = _direct.decode(*Step(device).args())
        assert out.is_inference()
    step = Step(device)
    other = step.copy()
    with torch.inference_mode():  # a pool that is older than the mode has a version still
        check_taken(step, other=other)


def check_taken_in_inference(step):
    other = step.copy()
    want, out = other.by_operator(), _direct.decode(*step.args())
    assert torch.equal(bits(out), bits(want)) and torch.equal(bits(step.state), bits(other.state))


def change(name, to):
    def changed(step):
        setattr(step, name, to(getattr(step, name)))
        return step

    return changed


def spread(t):
    """With elements that are not beside each other."""
    return torch.stack((t, t), -1)[..., 0]


def of_one_head(step):
    for name in ("q", "k", "v", "state"):
        setattr(step, name, getattr(step, name)[:, :1])
    step.slope = torch.rand(ROWS, 1, device=step.slope.device)
    return step


# What the operator does in another way, and what it complains of.
DONE = {
    "float64": lambda s: change("slope", lambda t: t.double())(Step(s.q.device.type, dtype=FP64, pool_dtype=FP64)),
    "strided q": change("q", spread),
    "no rows": lambda s: Step(s.q.device.type, rows=0),
    "a pool without a unit stride": change("state", spread),
    "strided slopes": change("slope", spread),
    "strided indices": change("indices", spread),
    "slopes to be negated": change("slope", lambda t: torch._neg_view(-t)),
    "a slope for each row, the imaginary part of a conjugate": lambda s: change(
        "slope", lambda t: torch.complex(t[:, :1], -t[:, :1]).conj().imag
    )(of_one_head(s)),
    "q to be negated": lambda s: change("q", lambda t: torch._neg_view(-t))(Step(s.q.device.type, dtype=FP32)),
    "a parameter": change("q", lambda t: torch.nn.Parameter(t.clone(), requires_grad=False)),
}
REFUSED = {
    "v of another dtype": change("v", lambda t: t.to(FP16)),
    "k of other heads": change("k", lambda t: t[:, :1]),
    "k of another head dim": change("k", lambda t: t[..., :8]),
    "an odd head dim": change("v", lambda t: t[..., :20]),
    "a vector": change("q", lambda t: t[0, 0]),
    "half a state": change("state", lambda t: t.to(FP16)),
    "a pool of other heads": change("state", lambda t: t[:, :1]),
    "an expanded pool": change("state", lambda t: t[:1].expand(SLOTS, -1, -1, -1)),
    "float64 slopes": change("slope", lambda t: t.double()),
    "slopes of other heads": change("slope", lambda t: t[:1]),
    "slopes of too many rows": change("slope", lambda t: t.expand(9, -1)),
    "float indices": change("indices", lambda t: t.float()),
    "too few indices": change("indices", lambda t: t[:1]),
    "a pool of other rows": change("indices", lambda t: None),
    "a pool that requires grad": change("state", lambda t: t.requires_grad_()),
    "a q that requires grad": change("q", lambda t: t.clone().requires_grad_()),
    "a slope that requires grad": change("slope", lambda t: t.requires_grad_()),
    "no tensor": change("q", lambda t: 1.0),
}


@pytest.mark.parametrize("name", DONE)
def test_what_the_operator_does_otherwise(device, name):
    step = DONE[name](Step(device))
    check_declined(step)
    other = step.copy()
    want = other.by_operator(scale=0.5)
    assert torch.equal(bits(step.by_function(scale=0.5)), bits(want))
    assert torch.equal(bits(step.state), bits(other.state))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_operator_refuses(device, name):
    step = REFUSED[name](Step(device))
    check_declined(step)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as want:
        step.by_operator()
    with pytest.raises(want.type) as raised:
        step.by_function()
    assert str(raised.value) == str(want.value)


def test_a_pool_to_be_negated(device):
    """The operator ends in an assertion of torch's."""
    check_declined(change("state", lambda t: torch._neg_view(-t))(Step(device)), has_memory=False)


def test_tensors_of_other_devices(device):
    for name in ("k", "v", "state", "slope", "indices"):
        check_declined(change(name, lambda t: t.to("meta"))(Step(device)), has_memory=name != "state")


def test_unaligned_rows_are_copied_by_the_operator():
    """Where the kernels want 16 bytes; the rule is the same on a CPU, whose kernels read them as they are."""
    step = Step("cpu", index=None)
    memory = torch.zeros(step.q.numel() + 1, dtype=BF16)
    step.q = memory[1:].view(step.q.shape).copy_(step.q)
    check_declined(step)


def test_a_slot_that_is_not_there():
    step = Step("cpu")
    step.indices = torch.tensor([0, 1, SLOTS])
    check_declined(step)
    with pytest.raises(RuntimeError, match=r"la2::decode: state_indices\[2\] is 5"):
        step.by_function()


def test_an_inference_tensor_outside_of_the_mode(device):
    with torch.inference_mode():
        step = Step(device)
    check_declined(step)
    with pytest.raises(RuntimeError, match="la2::decode: state cannot be updated in place, expected .*inference_mode"):
        step.by_function()


def test_wrong_counts_of_arguments():
    with pytest.raises(TypeError, match="expected q, k, v"):
        _direct.decode(1, 2)
    step = Step("cpu")
    for scale, silu in (("1", 0), (1.0, "0"), (1.0, 8), (1.0, -1), (1.0, 1 << 70)):
        check_declined(step, scale=scale, silu=silu)


# ---- whoever looks on at torch's operators sees the step


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionNames(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", (Names, FunctionNames))
def test_modes(device, mode):
    step = Step(device)
    with torch.no_grad(), mode() as names:
        step.by_function()
    assert any("la2.decode" in name for name in names.seen)


def test_profiler(device):
    step = Step(device)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        step.by_function()
    assert "la2::decode" in {event.key for event in profile.key_averages()}


def test_autocast(device):
    step = Step(device, dtype=FP32)
    with torch.no_grad(), torch.autocast(device, BF16):
        assert step.by_function().dtype == BF16


def test_vmap(device):
    step = Step(device, index=None)
    scales = torch.tensor([1.0, 2.0], device=device)[:, None, None, None]
    q = step.q.clone() * scales.to(BF16)
    states = torch.stack((step.state, step.state))

    def decode(q, state):
        return lightning_attention_decode(q, step.k, step.v, state, step.slope)

    with torch.no_grad():
        out = torch.func.vmap(decode)(q, states)
    assert out.shape == (2, ROWS, HEADS, E) and torch.equal(out[1], 2 * out[0])


@pytest.mark.parametrize("transform", ("vmap", "grad", "jvp", "functionalize"))
def test_transforms_of_something_else(device, transform):
    """Even where no tensor of the call is the transform's."""
    step = Step(device)

    def call(x):
        check_declined(step)
        return (x * x).sum()

    x = torch.ones(3, device=device)
    run = getattr(torch.func, transform)
    run(call, (x,), (x,)) if transform == "jvp" else run(call)(x)


def test_functional_tensors():
    step = Step("cpu")
    step.q = torch._to_functional_tensor(step.q)
    check_declined(step)


def test_subclasses_and_proxies(device):
    class Own(torch.Tensor):
        pass

    step = Step(device)
    step.q = step.q.as_subclass(Own)
    check_declined(step)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = Step(device)
        assert isinstance(fake.q, type(mode.from_tensor(torch.zeros(1)))) and fake.by_function().shape == fake.v.shape

    def decode(q, k, v, state):
        return lightning_attention_decode(q, k, v, state)

    traced = torch.fx.symbolic_trace(decode)
    assert any("la2.decode" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.filterwarnings("ignore")  # of its deprecation
def test_traced_graphs_hold_the_operator(device):
    step = Step(device)

    def decode(q):
        return lightning_attention_decode(q, step.k, step.v, step.state, step.slope, state_indices=step.indices)

    with torch.no_grad():
        traced = torch.jit.trace(decode, (step.q,), check_trace=False)
    assert "la2::decode" in str(traced.graph)


def test_compiled_graphs_hold_the_operator(device):
    step, graphs = Step(device), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda: step.by_function(), backend=keep, fullgraph=True)
        compiled()
    assert len(graphs) == 1 and any("la2.decode" in str(node.target) for node in graphs[0].graph.nodes)


# ---- switched off


def test_checked_values_are_the_operators(device, monkeypatch):
    monkeypatch.setenv("LA2_CHECK", "1")
    check_declined(Step(device))


def test_switch():
    code = "from lightning_attn2_ext import _direct; print(_direct.decode is None, _direct.status)"
    for value, said in (("0", "True switched off by LA2_DIRECT=0"), ("1", "False available")):
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env=os.environ | {"LA2_DIRECT": value}, timeout=120, capture_output=True, text=True)
        assert done.stdout.strip() == said


# ---- on a GPU


@pytest.mark.gpu
def test_streams_and_graphs():
    step = Step("cuda")
    other = step.copy()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would not wait for what comes now
        step.q.mul_(2)
        out = _direct.decode(*step.args())
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, other.by_operator()) and torch.equal(step.state, other.state)

    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = _direct.decode(*step.args())
    assert out is not None and torch.equal(step.state, other.state)
    for _ in range(2):
        graph.replay()
        want = other.by_operator()
    assert torch.equal(out, want) and torch.equal(step.state, other.state)


@pytest.mark.gpu
def test_memory_comes_back():
    step = Step("cuda")
    for _ in range(3):
        _direct.decode(*step.args())
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        _direct.decode(*step.args())
    assert torch.cuda.memory_allocated() == before


def test_references():
    """What is handed in belongs to the caller afterwards, and what comes back to the caller alone."""
    step = Step("cpu")
    args = step.args()
    before = [sys.getrefcount(a) for a in args[:-1]]  # small integers are everybody's
    for _ in range(50):
        out = _direct.decode(*args)
        assert _direct.decode(*args[:-1], 9) is None
    assert [sys.getrefcount(a) for a in args[:-1]] == before and sys.getrefcount(out) == 2


def test_another_thread(device):
    from concurrent.futures import ThreadPoolExecutor

    step = Step(device)
    want = step.copy().by_operator()
    with ThreadPoolExecutor(4) as pool:
        steps = [step.copy() for _ in range(32)]
        outs = list(pool.map(lambda s: _direct.decode(*s.args()), steps))
    assert all(torch.equal(out, want) for out in outs)
    assert lightning_attn2_ext.lightning_attention_decode is lightning_attention_decode
