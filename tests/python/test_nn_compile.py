"""A model of `nn.LightningAttention` layers under torch.compile, torch.export and AOTInductor."""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from lightning_attn2_ext import _load
from lightning_attn2_ext.nn import PRESETS
from tests.support.models import LanguageModel, Served, tokens

LENGTHS = (2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257)
assert len(set(LENGTHS)) == 20

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("gcc") is None, reason="inductor needs g++ or gcc on PATH"
)
presets = pytest.mark.parametrize("preset", PRESETS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(preset, device="cpu"):
    torch.manual_seed(0)
    return LanguageModel(preset).to(device)


def loss_and_gradients(model, parameters, batch, **options):
    batch = batch.to(parameters[0].device)
    loss = F.cross_entropy(model(batch[:, :-1], **options).flatten(0, 1), batch[:, 1:].flatten())
    return loss, *torch.autograd.grad(loss, parameters)


def assert_near(got, want):
    """The graph's own norms and activations are compiled anew and are a few roundings off."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def train_over_lengths(preset, backend, lengths, device="cpu", **options):
    model = build(preset, device)
    parameters, counter = list(model.parameters()), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, **options)
    for length in lengths:
        batch = tokens(2, length + 1, seed=length)
        assert_near(loss_and_gradients(compiled, parameters, batch), loss_and_gradients(model, parameters, batch))
    return counter.frame_count


@presets
def test_training_compiles_twice_for_20_lengths(device, preset):
    """fullgraph: a graph break is an error. Once for the first length, once for all others."""
    assert train_over_lengths(preset, "aot_eager", LENGTHS, device) <= 2


@needs_compiler
@pytest.mark.slow
def test_training_by_inductor(device):
    assert train_over_lengths("minimax", "inductor", (64, 257), device, dynamic=True) <= 2


def test_training_under_autocast_and_with_checkpoints():
    model = build("minimax")
    model.checkpoints = True

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    parameters, batch = list(model.parameters()), tokens(2, 40)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert_near(loss_and_gradients(compiled, parameters, batch), loss_and_gradients(forward, parameters, batch))


@pytest.mark.parametrize("preset", ["transnormer", "ring_linear"])  # each has what the other two have
def test_packed_training_compiles_twice(preset):
    model, counter = build(preset), CompileCounterWithBackend("aot_eager")
    parameters = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for edges in ((0, 9, 20), (0, 4, 4, 30), (0, 2, 5)):
        options = {"cu_seqlens": torch.tensor(edges, dtype=torch.int32)}
        batch = tokens(1, edges[-1] + 1)
        got = loss_and_gradients(compiled, parameters, batch, **options)
        assert_near(got, loss_and_gradients(model, parameters, batch, **options))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("preset", ["transnormer", "ring_linear"])
def test_serving_compiles_twice_for_prompts_and_once_for_steps(device, preset):
    model, prefills, steps = (
        build(preset, device),
        CompileCounterWithBackend("aot_eager"),
        CompileCounterWithBackend("aot_eager"),
    )
    prefill = torch.compile(model, fullgraph=True, backend=prefills)
    step = torch.compile(model, fullgraph=True, backend=steps)
    with torch.no_grad():
        for length in (7, 20, 33, 64, 150):
            ids = tokens(3, length + 6, seed=length).to(device)
            mask = torch.ones(3, length, dtype=torch.int64, device=device)
            mask[0, : length // 2] = 0
            states, plain = model.new_states(3), model.new_states(3)
            addresses = [s.state.data_ptr() for s in states]
            got = [prefill(ids[:, :length], states, attention_mask=mask)]
            want = [model(ids[:, :length], plain, attention_mask=mask)]
            for t in range(length, length + 6):
                got.append(step(ids[:, t : t + 1], states))
                want.append(model(ids[:, t : t + 1], plain))
            assert_near(got, want)
            assert_near([s.state for s in states], [s.state for s in plain])
            assert [s.length.tolist() for s in states] == [s.length.tolist() for s in plain]
            assert addresses == [s.state.data_ptr() for s in states]
    assert prefills.frame_count <= 2 and steps.frame_count == 1


def served(preset, length):
    """The model of tensors alone and its arguments."""
    model = Served(build(preset)).eval()
    states = model.model.new_states(2)
    shapes = {s.state.shape for s in states}
    assert len(shapes) == 1, "one tensor for all layers needs layers that are alike"
    lengths = torch.stack([s.length for s in states])
    return model, (tokens(2, length), torch.stack([s.state for s in states]), lengths)


def run(program, arguments, pieces):
    ids, states, lengths = (t.clone() for t in arguments)
    return torch.cat([program(piece, states, lengths) for piece in ids.split(pieces, 1)], 1), states, lengths


def export(preset):
    model, arguments = served(preset, 40)
    length = torch.export.Dim("length", min=2, max=4096)
    with torch.no_grad():
        prefill = torch.export.export(model, arguments, dynamic_shapes=({1: length}, None, None))
        step = torch.export.export(model, (arguments[0][:, :1].contiguous(), *arguments[1:]))
    return model, prefill, step


@pytest.mark.parametrize("preset", ["minimax", "ring_linear", "retnet"])
def test_exported(preset):
    model, prefill, step = export(preset)
    forward = "la2.forward_silu.default" if PRESETS[preset].activated else "la2.forward_with_state.default"
    assert forward in {str(n.target) for n in prefill.graph.nodes}
    assert "la2.decode.default" in {str(n.target) for n in step.graph.nodes}
    _, arguments = served(preset, 70)
    with torch.no_grad():
        want = run(model, arguments, (60, 8, 1, 1))

        def program(ids, states, lengths):
            return (prefill if ids.shape[1] > 1 else step).module()(ids, states, lengths)

        got = run(program, arguments, (60, 8, 1, 1))
    assert_near(got[:2], want[:2])
    assert torch.equal(got[2], want[2]) and got[2].tolist() == [[70, 70]] * 2


LOADER = pathlib.Path(__file__).resolve().parents[1] / "aot_inductor" / "run_package.cpp"


def build_loader(folder):
    """By the command that the file itself states."""
    text = LOADER.read_text()
    command = re.search(r"//   (g\+\+ .*\n(?://       .*\n)+)", text)[1].replace("//", "")
    words = shlex.split(command.replace("TORCH", torch.__path__[0]))
    words[words.index(LOADER.name)] = str(LOADER)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run_package"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the loader is built with g++, which is not on PATH")
def test_packaged_decode_runs_in_cpp(tmp_path):
    """A step of the model three times in a process without Python: its output, and the cache that it updates."""
    from torch._inductor import aoti_compile_and_package

    model, _, step = export("minimax")
    package = aoti_compile_and_package(step, package_path=str(tmp_path / "step.pt2"))
    _, (ids, states, lengths) = served("minimax", 40)
    with torch.no_grad():
        model(ids, states, lengths)
    arguments = [ids[:, :1].contiguous(), states, lengths]
    torch.save(arguments, tmp_path / "arguments.pt")
    library = _load.FOLDER / "liblightning_attn2.so"
    command = [build_loader(tmp_path), library, package, tmp_path / "arguments.pt", tmp_path / "results.pt", "3"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    with torch.no_grad():
        for _ in range(3):
            want = model(*arguments)
    out, _, got_states, got_lengths = torch.load(tmp_path / "results.pt", weights_only=False)
    assert_near((out, got_states), (want, states))
    assert torch.equal(got_lengths, lengths) and lengths.tolist() == [[43, 43]] * 2
