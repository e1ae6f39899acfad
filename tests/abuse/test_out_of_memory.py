"""Out of memory anywhere in forward and backward: torch.OutOfMemoryError, and nothing else has happened."""

import contextlib

import pytest
import torch

import lightning_attn2_ext
from lightning_attn2_ext import _ops
from tests.support.cases import Case

la2 = torch.ops.la2
MIB = 1 << 20


def problem():
    """Results of 32 MiB and, with 32 segments, local states of as much: a block of the allocator each."""
    x = Case(heads=16, length=8192, key_dim=128, value_dim=128, dtype=torch.bfloat16).make("cuda")
    x.slope = torch.linspace(0.001, 0.1, 16, device="cuda")
    return x


@contextlib.contextmanager
def room_for(blocks):
    """No memory but so many times 32 MiB: all of what the process may have is taken, and that much given back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = []
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (blocks + 4) * 32 * MIB) / total)
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(32 * MIB, dtype=torch.int8, device="cuda"))
        with contextlib.suppress(torch.OutOfMemoryError):  # what is left between blocks
            while True:
                held.append(torch.empty(2 * MIB, dtype=torch.int8, device="cuda"))
        large = [t for t in held if t.numel() == 32 * MIB]
        assert len(large) >= blocks, "no memory to give back: this shows nothing"
        given_back = {id(t) for t in large[:blocks]}
        del large
        held[:] = [t for t in held if id(t) not in given_back]
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()


def forward(x):
    return la2.forward_with_state(*x.args, **x.options)


def backward(x):
    return la2.backward(*x.grads, *x.args, **x.options)


def autograd(x):
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    out = la2.forward(*leaves, x.slope)
    return out, *torch.autograd.grad(out, leaves, x.grad_out)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ("segments=1", "segments=32"))
@pytest.mark.parametrize("call", (forward, backward, autograd))
def test_out_of_memory_at_every_allocation(monkeypatch, call, plan):
    """With room for none, one, two ... of its allocations, until it has enough."""
    monkeypatch.setenv("LA2_PLAN", plan)
    x = problem()
    want = [t.cpu() for t in call(x)]
    failed = 0
    for blocks in range(16):
        used = torch.cuda.memory_allocated()
        with room_for(blocks):
            before, got, said = torch.cuda.memory_allocated(), None, ""
            try:
                got = [t.cpu() for t in call(x)]
            except torch.OutOfMemoryError as error:
                said = str(error)
            if got is not None:
                break
            failed += 1
            assert "out of memory" in said
            assert torch.cuda.memory_allocated() == before, "something of the failed call is still held"
            assert torch.ones(3, device="cuda").sum().item() == 3
        assert torch.cuda.memory_allocated() == used
        assert all(torch.equal(a.cpu(), b) for a, b in zip(call(x), want, strict=True)), "the next call is right"
    results = {forward: 1, backward: 3, autograd: 4}[call]
    assert failed >= results, "it did not fail at each of its results: this shows nothing"
    assert got is not None and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_out_of_memory_in_inference_mode():
    """There is no Autograd key, in whose kernel the type of the error is put right."""
    x = problem()
    with room_for(0), torch.inference_mode(), pytest.raises(RuntimeError, match="la2: out of memory"):
        lightning_attn2_ext.lightning_attention(x.q, x.k, x.v, x.slope)


def test_which_errors_are_out_of_memory():
    """Host logic: what the library says becomes torch's own error on a GPU, everything else stays as it is."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    cpu, gpu = torch.ones(1), torch.ones(1).as_subclass(OnGpu)
    said = "la2: out of memory: 32 bytes on cuda:0: CUDA out of memory. Tried to allocate 2 GiB"
    with pytest.raises(torch.OutOfMemoryError, match="la2: out of memory"):
        _ops.raise_out_of_memory(RuntimeError(said), [None, gpu])
    for text, where in (("la2::forward: k.shape[-1] is 4", gpu), (said, cpu), ("out of memory", gpu)):
        _ops.raise_out_of_memory(RuntimeError(text), [where])


def test_more_than_any_memory_on_the_cpu():
    """One row for 2^40 of them: the result has no room. An error that says so, and the next call is right."""
    many = torch.ones(1, 1, 1, 8).expand(1, 1, 1 << 44, 8)
    with pytest.raises(RuntimeError, match=r"la2: out of memory: \d+ bytes on cpu") as caught:
        la2.forward(many, many, many)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    x = Case(length=3).make()
    assert la2.forward(*x.args).isfinite().all()
