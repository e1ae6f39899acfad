"""The operators inside torch's transformations: compile, export, AOTInductor, vmap, torch.func, version counters."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2
from tests.support.cases import Case
from triton_ref import naive

la2 = torch.ops.la2

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("gcc") is None, reason="inductor needs g++ or gcc on PATH"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- opcheck

SMALL = {"heads": 2, "key_dim": 8, "value_dim": 16, "slope": "mixed"}
OPCHECK = {
    "bhnd": Case(batch=2, length=21, **SMALL),
    "bnhd": Case(batch=2, length=21, layout="bnhd", state_layout="vk", scale=0.5, **SMALL),
    "qkv": Case(batch=1, length=5, layout="qkv", dtype=torch.bfloat16, slope_per_seq=True, **SMALL),
    "turned": Case(batch=2, length=5, layout="turned", dtype=torch.float64, **SMALL),
    "packed": Case(lengths=(3, 0, 18), slope_per_seq=True, index_dtype=torch.int64, **SMALL),
    "packed bnhd": Case(lengths=(0, 7, 1), layout="bnhd", state_layout=None, **SMALL),
    "no state": Case(batch=2, length=6, state_layout=None, **SMALL),
    "nothing optional": Case(batch=2, length=6, state_layout=None, **SMALL | {"slope": "none"}),
    "one row": Case(batch=1, length=1, dtype=torch.float16, **SMALL | {"heads": 1}),
    "no tokens": Case(batch=2, length=0, **SMALL),
}


def with_gradients(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def leaves_as_stored(*tensors):
    """Leaves that keep their strides: clone would make a slice dense."""
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("case", OPCHECK.values(), ids=OPCHECK)
@pytest.mark.parametrize("operator", ("forward", "forward_with_state"))
def test_opcheck_forward(device, operator, case):
    x = case.make(device)
    *args, state = leaves_as_stored(*x.args, x.initial_state)
    torch.library.opcheck(getattr(la2, operator).default, tuple(args), x.options | {"initial_state": state})


@pytest.mark.parametrize("need_dslope", (True, False))
@pytest.mark.parametrize("case", OPCHECK.values(), ids=OPCHECK)
def test_opcheck_backward(device, case, need_dslope):
    x = case.make(device)
    grad_out, *args, state = leaves_as_stored(x.grad_out, *x.args, x.initial_state)
    grad_state = x.grad_final_state.requires_grad_() if need_dslope else None
    options = x.options | {"initial_state": state, "need_dslope": need_dslope}
    torch.library.opcheck(la2.backward.default, (grad_out, grad_state, *args), options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("kind", ("plain", "slots", "vk", "nothing optional"))
def test_opcheck_decode(device, dtype, kind):
    case = Case(batch=3, length=1, dtype=dtype, state_layout="vk" if kind == "vk" else "kv", **SMALL)
    x = case.make(device)
    slope = None if kind == "nothing optional" else x.slope
    indices = None if kind == "nothing optional" else torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    rows = [t[:, :, 0] for t in (x.q, x.k, x.v)]
    torch.library.opcheck(la2.decode.default, (*rows, x.initial_state, slope), {"state_indices": indices, "scale": 0.5})


# ---- compile, export, AOTInductor


def model(q, k, v, slope, state):
    """Operators between others, so that a graph has something to fuse around them."""
    out, final_state = la2.forward_with_state(torch.nn.functional.silu(q), k, v, slope, initial_state=state, scale=0.5)
    return la2.forward(q, torch.tanh(k), out, slope) * 2, final_state


def inputs_of_length(device, length, dtype=torch.float32):
    x = Case(heads=2, batch=2, length=length, dtype=dtype, slope="mixed", seed=length).make(device)
    return with_gradients(*x.args, x.initial_state), x.grads


def values_and_gradients(function, leaves, cotangents):
    values = function(*leaves)
    return *values, *torch.autograd.grad(values, leaves, cotangents)


def assert_near(got, want):
    """Of each tensor's norm: inductor's own exp and tanh are a few roundings off, and sums may cancel."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm(), f"{((a - b).norm() / b.norm()).item():.1e}"


def assert_compiles(device, backend, lengths):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in lengths:
        leaves, cotangents = inputs_of_length(device, length)
        got = values_and_gradients(compiled, leaves, cotangents)
        want = values_and_gradients(model, leaves, cotangents)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.stride() == b.stride()
            assert backend == "inductor" or torch.equal(a, b)
        assert_near(got, want)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {len(lengths)} lengths"


LENGTHS = (2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257)


def test_compiled_once_for_every_length(device):
    assert_compiles(device, "aot_eager", LENGTHS)


@needs_compiler
@pytest.mark.slow
def test_compiled_by_inductor(device):
    assert_compiles(device, "inductor", LENGTHS)


def test_compiled_packed_sequences(device):
    """The number of sequences and of tokens may both change."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def packed(q, k, v, slope, cu_seqlens):
        return la2.forward_with_state(q, k, v, slope, cu_seqlens=cu_seqlens)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((3, 4), (5, 0, 9), (60, 70, 80, 90), (2, 2, 2, 2, 2)):
        x = Case(heads=2, lengths=lengths, state_layout=None, slope="mixed").make(device)
        leaves = with_gradients(*x.args)
        for a, b in zip(compiled(*leaves, x.cu_seqlens), packed(*leaves, x.cu_seqlens), strict=True):
            assert torch.equal(a, b)
        got, want = (torch.autograd.grad(f(*leaves, x.cu_seqlens), leaves, x.grads) for f in (compiled, packed))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


def test_compiled_decode_updates_its_state(device):
    def step(q, k, v, state, slope, indices):
        return la2.decode(q * 2, k, v, state, slope, state_indices=indices) + state[0, 0, 0, 0]

    x = Case(heads=2, batch=3, length=4, slope="mixed").make(device)
    indices = torch.tensor([1, -1, 2], dtype=torch.int32, device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    one, two = x.initial_state.clone(), x.initial_state.clone()
    for t in range(4):
        rows = [z[:, :, t] for z in (x.q, x.k, x.v)]
        got = compiled(*rows, one, x.slope, indices)
        assert torch.equal(got, step(*rows, two, x.slope, indices))
        assert torch.equal(one, two)
    assert not torch.equal(one, x.initial_state)


class Model(torch.nn.Module):
    def forward(self, q, k, v, slope, state):
        return model(q, k, v, slope, state)


def exported(device):
    leaves, _ = inputs_of_length(device, 40)
    args = tuple(t.detach() for t in leaves)
    length = torch.export.Dim("length", min=2, max=4096)
    return torch.export.export(Model(), args, dynamic_shapes=({2: length}, {2: length}, {2: length}, None, None))


def test_exported(device):
    program = exported(device)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"la2.forward.default", "la2.forward_with_state.default"} <= names
    for length in (2, 77, 300):
        args = [t.detach() for t in inputs_of_length(device, length)[0]]
        for a, b in zip(program.module()(*args), model(*args), strict=True):
            assert torch.equal(a, b)


PACKAGE_WITHOUT_OUR_OPERATORS = """
import sys, torch
from torch._inductor import aoti_compile_and_package, aoti_load_package

class Add(torch.nn.Module):
    def forward(self, x):
        return x + 1

x = torch.ones(4, device="cuda")
aoti_load_package(aoti_compile_and_package(torch.export.export(Add(), (x,)), package_path=sys.argv[1]))
"""


def skip_where_no_package_loads(path):
    """torch 2.11 on CUDA beside some libstdc++: the package's own std::regex crashes while it is loaded."""
    done = subprocess.run([sys.executable, "-c", PACKAGE_WITHOUT_OUR_OPERATORS, str(path)], capture_output=True)
    if done.returncode < 0:
        pytest.skip(f"loading a CUDA package without these operators ends in signal {-done.returncode} here")
    assert done.returncode == 0, done.stderr.decode()


@needs_compiler
@pytest.mark.slow
def test_packaged_by_aot_inductor(device, tmp_path):
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    if device == "cuda":
        skip_where_no_package_loads(tmp_path / "without.pt2")
    with torch.no_grad():
        package = aoti_compile_and_package(exported(device), package_path=str(tmp_path / "model.pt2"))
        loaded = aoti_load_package(package)
        for length in (2, 77, 300):
            args = [t.detach() for t in inputs_of_length(device, length)[0]]
            assert_near(loaded(*args), model(*args))


# ---- vmap: every argument alone, and all at once, from any dimension

SAMPLES = 3
ROWS = ("q", "k", "v", "slope", "initial_state")


def mapped_arguments(case, device, names, dim):
    """{name: tensor} with a mapped dimension at `dim` for `names`, and vmap's in_dims in the same order."""
    samples = [Case(**(vars(case) | {"seed": i})).make(device) for i in range(SAMPLES)]

    def tensors(x):
        given = {"grad_out": x.grad_out, "grad_final_state": x.grad_final_state}
        given |= dict(zip(ROWS, (*x.args, x.initial_state), strict=True))
        return given | {"slope": x.slope * (1 + 0.25 * samples.index(x))}

    each = [tensors(x) for x in samples]
    values, dims = {}, {}
    for name, first in each[0].items():
        if name in names:
            dims[name] = dim if dim >= 0 else first.dim()
            values[name] = torch.stack([t[name] for t in each], dims[name])
        else:
            dims[name], values[name] = None, first
    return values, dims


def assert_same_mapped(function, values, dims):
    got = torch.vmap(function, in_dims=tuple(dims.values()))(*values.values())
    per_sample = []
    for i in range(SAMPLES):
        picked = [v if dims[n] is None else v.select(dims[n], i) for n, v in values.items()]
        per_sample.append(function(*picked))
    if isinstance(got, torch.Tensor):
        got, per_sample = (got,), [(r,) for r in per_sample]
    for a, *b in zip(got, *per_sample, strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-12, atol=1e-12)


VMAP_CASES = {
    "dense": Case(heads=2, batch=2, length=19, key_dim=8, value_dim=16, dtype=torch.float64),
    "per sequence": Case(heads=2, batch=2, length=5, slope_per_seq=True, slope="mixed", dtype=torch.float64),
    "packed bnhd": Case(heads=3, lengths=(4, 0, 9), slope_per_seq=True, layout="bnhd", dtype=torch.float64),
}
MAPPED = [(name,) for name in ROWS] + [ROWS, ("q", "k"), ("v", "slope")]


@pytest.mark.parametrize("dim", (0, 1, -1))
@pytest.mark.parametrize("names", MAPPED, ids="+".join)
@pytest.mark.parametrize("case", VMAP_CASES.values(), ids=VMAP_CASES)
def test_vmap_forward(device, case, names, dim):
    values, dims = mapped_arguments(case, device, names, dim)
    for d in (values, dims):
        del d["grad_out"], d["grad_final_state"]
    cu_seqlens = case.make(device).cu_seqlens

    def call(operator):
        return lambda q, k, v, slope, state: operator(
            q, k, v, slope, initial_state=state, cu_seqlens=cu_seqlens, scale=0.5
        )

    assert_same_mapped(call(la2.forward), values, dims)
    assert_same_mapped(call(la2.forward_with_state), values, dims)


@pytest.mark.parametrize("dim", (0, -1))
@pytest.mark.parametrize("names", [*MAPPED, ("grad_out",), ("grad_final_state",), ("grad_out", *ROWS)], ids="+".join)
@pytest.mark.parametrize("case", VMAP_CASES.values(), ids=VMAP_CASES)
def test_vmap_backward(device, case, names, dim):
    values, dims = mapped_arguments(case, device, names, dim)
    cu_seqlens = case.make(device).cu_seqlens

    def call(grad_out, grad_state, q, k, v, slope, state):
        return la2.backward(grad_out, grad_state, q, k, v, slope, initial_state=state, cu_seqlens=cu_seqlens, scale=0.5)

    assert_same_mapped(call, values, dims)


def test_vmap_without_optional_arguments(device):
    x = Case(heads=2, batch=2, length=9, dtype=torch.float64, slope="none", state_layout=None).make(device)
    q = torch.stack([x.q, -x.q, 2 * x.q])
    values, dims = {"q": q, "k": x.k, "v": x.v}, {"q": 0, "k": None, "v": None}
    assert_same_mapped(la2.forward, values, dims)
    assert_same_mapped(la2.forward_with_state, values, dims)
    grads = torch.vmap(lambda q: la2.backward(x.grad_out, None, q, x.k, x.v)[:3])(q)
    for i in range(SAMPLES):
        for a, b in zip(grads, la2.backward(x.grad_out, None, q[i], x.k, x.v)[:3], strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)


def test_vmap_of_vmap(device):
    x = Case(heads=2, batch=6, length=9, dtype=torch.float64, slope="mixed").make(device)
    q, k, v = (t.unflatten(0, (3, 2, 1)) for t in (x.q, x.k, x.v))
    got = torch.vmap(torch.vmap(lambda q, k, v: la2.forward(q, k, v, x.slope)))(q, k, v)
    want = la2.forward(x.q, x.k, x.v, x.slope)
    torch.testing.assert_close(got.flatten(0, 2), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", (0, 1, 4))
@pytest.mark.parametrize("names", [("q", "k", "v"), ("q",), ("v",), ("slope",)], ids="+".join)
def test_vmap_decode_updates_each_state(device, names, dim):
    """The mapped state is updated in place, whether merging it into the heads copied it or not."""
    x = Case(heads=2, batch=3, length=SAMPLES, dtype=torch.float64, slope="mixed").make(device)
    slots = torch.tensor([2, -1, 0], dtype=torch.int64, device=device)
    values = {n: t[:, :, 0] for n, t in (("q", x.q), ("k", x.k), ("v", x.v))} | {"slope": x.slope}
    dims = dict.fromkeys(values)
    for name in names:
        stacked = [x.slope * i for i in range(1, SAMPLES + 1)]
        if name != "slope":
            stacked = getattr(x, name).unbind(2)
        values[name], dims[name] = torch.stack(list(stacked), -1), values[name].dim()
    states = torch.stack([x.initial_state, 2 * x.initial_state, -x.initial_state], dim)
    before, expected = states.clone(), states.clone()
    version = states._version

    def call(q, k, v, slope, state):
        return la2.decode(q, k, v, state, slope, state_indices=slots, scale=0.5)

    got = torch.vmap(call, in_dims=(*dims.values(), dim))(*values.values(), states)
    for i in range(SAMPLES):
        rows = [t if dims[n] is None else t.select(dims[n], i) for n, t in values.items()]
        want = call(*rows, expected.select(dim, i))
        torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)
        assert not got[i, 1].any() and want[0].any()
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(states, before)
    assert states._version > version


def test_vmap_refuses_what_it_cannot_map(device):
    x = Case(heads=2, batch=2, length=1).make(device)
    rows = [torch.stack([t[:, :, 0]] * 2) for t in (x.q, x.k, x.v)]
    with pytest.raises(NotImplementedError, match="la2::decode: state is not mapped"):
        torch.vmap(lambda q, k, v: la2.decode(q, k, v, x.initial_state))(*rows)
    slots = torch.tensor([[0, 1], [1, 0]], device=device)
    states = torch.stack([x.initial_state] * 2)
    with pytest.raises(NotImplementedError, match="la2::decode: state_indices is mapped"):
        torch.vmap(lambda q, k, v, s, i: la2.decode(q, k, v, s, state_indices=i))(*rows, states, slots)
    x = Case(heads=2, lengths=(3, 4)).make(device)
    offsets = torch.stack([x.cu_seqlens] * 2)
    with pytest.raises(NotImplementedError, match="la2::forward: cu_seqlens is mapped"):
        torch.vmap(lambda c: la2.forward(x.q, x.k, x.v, cu_seqlens=c))(offsets)


# ---- torch.func: nested levels against the same of the specification

FUNC_CASES = {
    "dense": Case(heads=2, batch=1, length=3, key_dim=8, value_dim=8, dtype=torch.float64, slope="mixed", scale=0.5),
    "packed": Case(heads=1, lengths=(2, 0, 2), key_dim=8, value_dim=8, dtype=torch.float64, slope_per_seq=True),
}
ALONG = ("q", "k", "v", "slope", "initial_state")


class Along:
    """A problem as a function of one small vector t: every argument moves along its own random directions, so a
    derivative by t has parts of all of them, or of those in `names` alone."""

    def __init__(self, case, device, names, size=3):
        self.x = x = case.make(device)
        self.names = names
        generator = torch.Generator().manual_seed(1)

        def draw(like):
            return torch.randn(size, *like.shape, generator=generator, dtype=like.dtype).to(like.device)

        # Slopes of 0 and 1e4 sit where derivatives vanish or are one-sided; these are plain.
        slope = torch.linspace(0.2, 0.9, x.slope.numel(), dtype=torch.float64, device=device).view(x.slope.shape)
        self.base = dict(zip(ALONG, (x.q, x.k, x.v, slope, x.initial_state), strict=True))
        self.directions = {name: draw(t) for name, t in self.base.items() if name in names}
        self.weights = [draw(g)[0] for g in x.grads]
        self.t = torch.tensor([0.02, -0.03, 0.05], dtype=torch.float64, device=device)

    def values(self, forward):
        """t -> both results."""

        def function(t):
            moved = dict(self.base)
            for name, direction in self.directions.items():
                moved[name] = moved[name] + torch.tensordot(t, direction, 1)
            state = moved.pop("initial_state")
            return forward(*moved.values(), initial_state=state, cu_seqlens=self.x.cu_seqlens, scale=self.x.scale)

        return function

    def vector(self, forward):
        """t -> a few numbers that every element of both results enters, not linearly."""
        values = self.values(forward)

        def function(t):
            out, state = values(t)
            out, state = out * self.weights[0], state * self.weights[1]
            first = out.sum() + state.square().sum()
            return torch.stack([first, torch.sin(out).sum() * state.sum(), out.square().sum()])

        return function

    def scalar(self, forward):
        vector = self.vector(forward)
        return lambda t: vector(t)[0] + vector(t).prod().sign() * vector(t)[2]


def func_combinations():
    from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

    def directional(f):
        return lambda t: jvp(f, (t,), (torch.cos(t),))[1]

    def pullback(f):
        return lambda t: vjp(f, t)[1](torch.ones(3, dtype=t.dtype, device=t.device))[0]

    def several(t):
        return torch.stack([t, 2 * t, t - 0.01, -t])

    return {  # name: (kind of function, transformation of it)
        "grad": ("scalar", grad),
        "grad of grad": ("scalar", lambda f: grad(lambda t: grad(f)(t).square().sum())),
        "three grads": ("scalar", lambda f: grad(lambda t: grad(lambda u: grad(f)(u).square().sum())(t).sum())),
        "jvp": ("vector", directional),
        "jvp of jvp": ("vector", lambda f: directional(directional(f))),
        "vjp": ("vector", pullback),
        "vjp of vjp": ("vector", lambda f: pullback(pullback(f))),
        "jvp of grad": ("scalar", lambda f: directional(grad(f))),
        "grad of jvp": ("scalar", lambda f: grad(lambda t: jvp(f, (t,), (torch.cos(t),))[1])),
        "jvp of vjp": ("vector", lambda f: directional(pullback(f))),
        "vjp of jvp": ("vector", lambda f: pullback(directional(f))),
        "jacrev": ("vector", jacrev),
        "jacfwd": ("vector", jacfwd),
        "jacrev of jacrev": ("vector", lambda f: jacrev(jacrev(f))),
        "jacfwd of jacfwd": ("vector", lambda f: jacfwd(jacfwd(f))),
        "jacrev of jacfwd": ("vector", lambda f: jacrev(jacfwd(f))),
        "hessian": ("scalar", hessian),
        "vmap of grad": ("scalar", lambda f: lambda t: vmap(grad(f))(several(t))),
        "grad of vmap": ("scalar", lambda f: grad(lambda t: vmap(f)(several(t)).square().sum())),
        "vmap of hessian": ("scalar", lambda f: lambda t: vmap(hessian(f))(several(t))),
        "jacfwd of vmap of grad": ("scalar", lambda f: jacfwd(lambda t: vmap(grad(f))(several(t)))),
    }


@pytest.mark.parametrize("names", [(name,) for name in ALONG] + [ALONG], ids="+".join)
@pytest.mark.parametrize("case", FUNC_CASES.values(), ids=FUNC_CASES)
def test_func_transformations(device, case, names):
    problem = Along(case, device, names)
    for name, (kind, transform) in func_combinations().items():
        got = transform(getattr(problem, kind)(la2.forward_with_state))(problem.t)
        want = transform(getattr(problem, kind)(naive.quadratic))(problem.t)
        assert want.any(), f"{name}: the specification's derivative is zero and shows nothing"
        error = ((got - want).norm() / want.norm()).item()
        assert error <= 1e-9, f"{name} is off by {error:.1e}"


def test_func_of_the_operator_without_a_state(device):
    """la2::forward has kernels of its own."""
    x = FUNC_CASES["dense"].make(device)
    slope = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device)

    def loss(forward):
        def function(q, k, v, slope):
            out = forward(q, k, v, slope)
            return (out if isinstance(out, torch.Tensor) else out[0]).square().sum()

        return function

    def second(forward):
        inner = torch.func.grad(loss(forward), argnums=(0, 1, 2, 3))
        return torch.func.grad(lambda *a: sum(g.square().sum() for g in inner(*a)), argnums=(0, 1, 2, 3))

    for got, want in zip(second(la2.forward)(x.q, x.k, x.v, slope), second(naive.quadratic)(x.q, x.k, x.v, slope)):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operator", ("forward", "forward_with_state"))
def test_forward_mode_under_no_grad(device, operator):
    """Forward-mode derivatives exist where reverse mode is switched off, and do not keep a graph."""
    x = FUNC_CASES["dense"].make(device)
    slope = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device)
    tangent = torch.ones_like(slope)
    with torch.no_grad(), forward_ad.dual_level():
        out = getattr(la2, operator)(x.q, x.k, x.v, forward_ad.make_dual(slope, tangent))
        out = out if operator == "forward" else out[0]
        got = forward_ad.unpack_dual(out).tangent
    want = torch.func.jvp(lambda s: naive.quadratic(x.q, x.k, x.v, s)[0], (slope,), (tangent,))[1]
    assert want.any()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# ---- version counters, inference mode


def decode_step(device):
    x = Case(heads=2, batch=2, length=1, slope="usual").make(device)
    return [t[:, :, 0] for t in (x.q, x.k, x.v)], x.initial_state, x.slope


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_decode_says_that_it_changed_its_state(device, mode):
    """A graph that saved the old state must refuse to run backward, whatever mode the step ran in."""
    rows, state, slope = decode_step(device)
    weight = torch.ones_like(state, requires_grad=True)
    loss = (weight * state).sum()  # saves state
    version = state._version
    with mode():
        la2.decode(*rows, state, slope)
    assert state._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_saved_by_the_operator_may_not_change(device):
    rows, state, slope = decode_step(device)
    q = rows[0][:, :, None].clone().requires_grad_()
    loss = la2.forward(q, q, q, slope, initial_state=state).sum()
    with torch.no_grad():
        la2.decode(*rows, state, slope)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_decode_of_a_view_changes_its_base(device):
    rows, state, slope = decode_step(device)
    pool = torch.stack([state, state], 1)[:, 0]  # a view
    base_version = pool._base._version
    want = la2.decode(*rows, state, slope)
    assert torch.equal(la2.decode(*rows, pool, slope), want)
    assert torch.equal(pool, state)
    assert pool._base._version > base_version


def test_inference_mode(device):
    x = Case(heads=2, batch=2, length=40, slope="mixed").make(device)
    want = la2.forward_with_state(*x.args, **x.options)
    grads = la2.backward(*x.grads, *x.args, **x.options)
    rows, state, slope = decode_step(device)
    twin = state.clone()
    step = la2.decode(*rows, twin, slope)
    with torch.inference_mode():
        got = la2.forward_with_state(*x.args, **x.options)
        assert torch.equal(la2.forward(*x.args, **x.options), want[0])
        got_grads = la2.backward(*x.grads, *x.args, **x.options)
        own = state.clone()
        assert own.is_inference()
        assert torch.equal(la2.decode(*rows, own, slope), step) and torch.equal(own, twin)
    for a, b in zip((*got, *got_grads), (*want, *grads), strict=True):
        assert torch.equal(a, b) and a.is_inference()
