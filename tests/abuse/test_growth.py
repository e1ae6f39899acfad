"""Ten thousand iterations hold no more memory at the end than at the start."""

import ctypes
import os
from pathlib import Path

import pytest
import torch

import lightning_attn2_ext
from tests.support.cases import Case
from tests.support.tolerance import one_thread

la2 = torch.ops.la2
ITERATIONS = 10_000
WARM = 2_000
#: Of a process's resident memory, whose pages move for other reasons too: 130 bytes an iteration.
RSS_SLACK = 1 << 20


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>, glibc 2.33 and later."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in "uordblks fordblks keepcost".split()]


def heap():
    """[meter] of what malloc has given out: pages that it has kept from before do not hide a leak from it."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return []
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return [("heap", info.uordblks + info.hblkhd, RSS_SLACK)]


def held(device):
    """(name, bytes, slack) of each meter."""
    if device == "cpu":
        return [*heap(), ("resident", resident(), 4 * RSS_SLACK if heap() else RSS_SLACK)]
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()  # as nvidia-smi shows it: also what no allocator knows of
    return [
        *heap(),
        ("allocated", torch.cuda.memory_allocated(), 0),
        ("reserved", torch.cuda.memory_reserved(), 0),
        ("used on the device", total - free, 0),
        ("resident", resident(), 4 * RSS_SLACK),
    ]


def iterate(device, step):
    """[(meter, growth, slack)] over ITERATIONS after WARM."""
    for _ in range(WARM):
        step()
    before = held(device)
    for _ in range(ITERATIONS):
        step()
    return [(name, now - then, slack) for (name, then, slack), (_, now, _) in zip(before, held(device), strict=True)]


def step_of(device, case):
    x = case.make(device)
    leaves = {n: getattr(x, n).detach().requires_grad_() for n in ("q", "k", "v", "slope", "initial_state")}
    y = x.replace(**leaves)
    pool = x.initial_state.clone()
    rows = 1 if x.cu_seqlens is not None else x.q.shape[0]

    def step():
        out, state = la2.forward_with_state(*y.args, **y.options)
        torch.autograd.grad((out, state), list(leaves.values()), (x.grad_out, x.grad_final_state))
        la2.decode(*(t[:rows, :, 0] for t in (x.q, x.k, x.v)), pool[:rows])
        with pytest.raises(RuntimeError):  # an error on the way out of the operator gives everything back too
            la2.forward(x.q, x.k[..., :8], x.v)

    return step


CASES = (
    Case(heads=2, batch=2, length=20, dtype=torch.float32, layout="turned"),
    Case(heads=2, lengths=(7, 0, 13), dtype=torch.bfloat16, slope_per_seq=True),
)


@pytest.mark.parametrize("case", CASES, ids=("dense, copied", "packed"))
def test_ten_thousand_iterations(device, case):
    with one_thread():
        growth = iterate(device, step_of(device, case))
    assert all(grown <= slack for _, grown, slack in growth), growth


def test_a_leak_is_seen(device):
    """Of one small tensor an iteration."""
    kept = []
    x = CASES[0].make(device)

    def step():
        kept.append(lightning_attn2_ext.lightning_attention(x.q, x.k, x.v)[:1].clone())

    growth = iterate(device, step)
    assert any(grown > slack for _, grown, slack in growth), growth
