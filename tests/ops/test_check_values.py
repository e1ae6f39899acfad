"""LA2_CHECK=1: values that lie on the device are looked at, and each that is wrong has its sentence."""

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2

la2 = torch.ops.la2
H, D, E, SLOTS, TOKENS = 2, 16, 8, 4, 7
NAN, INF = float("nan"), float("inf")
BOTH = pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)


def ints(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


def refused(call, sentence):
    """Refused with exactly this sentence."""
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value).splitlines()[0] == sentence


# ---- the operators


def decode(device, indices=(2, -1), dtype=torch.int32, slope=(0.0, 1.0), slots=SLOTS):
    """Output and pool; the pool starts at one."""
    rows = len(indices)
    q, k, v = (torch.ones(rows, H, d, device=device) for d in (D, D, E))
    state = torch.ones(slots, H, D, E, device=device)
    slope = torch.tensor(slope, device=device)
    return la2.decode(q, k, v, state, slope, state_indices=ints(*indices, dtype=dtype, device=device)), state


def prefill(device, operator, offsets=(0, 3, TOKENS), dtype=torch.int32, slope=(0.0, 1.0)):
    q, k, v = (torch.ones(1, H, TOKENS, d, device=device) for d in (D, D, E))
    slope = torch.tensor(slope, device=device)
    cu_seqlens = None if offsets is None else ints(*offsets, dtype=dtype, device=device)
    first = (torch.ones_like(v), None) if operator == "backward" else ()
    return getattr(la2, operator)(*first, q, k, v, slope, cu_seqlens=cu_seqlens)


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("LA2_CHECK", "1")


PREFILL = pytest.mark.parametrize("operator", ("forward", "forward_with_state", "backward"))


@BOTH
def test_right_values_change_nothing(device, monkeypatch, dtype):
    def everything():
        yield from decode(device, (2, -1, 0, -1, 3), dtype)
        for operator in ("forward", "forward_with_state", "backward"):
            results = prefill(device, operator, (0, 0, 3, TOKENS), dtype)
            yield from (results,) if isinstance(results, torch.Tensor) else results

    monkeypatch.delenv("LA2_CHECK", raising=False)
    want = list(everything())
    monkeypatch.setenv("LA2_CHECK", "1")
    assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))


@BOTH
@pytest.mark.parametrize(
    ("indices", "sentence"),
    (
        ((0, SLOTS), "state_indices[1] is 4, expected less than the 4 slots of state"),
        ((3, -1, 1, 3), "state_indices[3] is 3 like state_indices[0], expected a slot that no other row writes to"),
    ),
)
def test_decode_slots(device, checked, dtype, indices, sentence):
    refused(lambda: decode(device, indices, dtype), f"la2::decode: {sentence}")


SLOPES = (
    ((0.5, -0.25), "slope[1] is -0.25"),
    ((NAN, 0.5), "slope[0] is nan"),
    ((0.5, INF), "slope[1] is inf"),
    (((0.5, 0.5), (0.5, -INF)), "slope[1, 1] is -inf"),
)


@pytest.mark.parametrize(("slope", "start"), SLOPES)
def test_decode_slopes(device, checked, slope, start):
    sentence = f"la2::decode: {start}, expected a finite number that is not negative"
    refused(lambda: decode(device, slope=slope), sentence)


@PREFILL
@pytest.mark.parametrize(("slope", "start"), SLOPES)
def test_prefill_slopes(device, checked, operator, slope, start):
    sentence = f"la2::{operator}: {start}, expected a finite number that is not negative"
    refused(lambda: prefill(device, operator, slope=slope), sentence)


@PREFILL
@BOTH
@pytest.mark.parametrize(
    ("offsets", "sentence"),
    (
        ((1, 3, TOKENS), "cu_seqlens[0] is 1, expected 0"),
        ((-1, 3, TOKENS), "cu_seqlens[0] is -1, expected 0"),
        ((0, 5, 3, TOKENS), "cu_seqlens[2] is 3, expected at least cu_seqlens[1] = 5"),
        ((0, 3, TOKENS - 1), "cu_seqlens[-1] is 6, expected the number of tokens, 7"),
        ((0, 3, TOKENS + 1), "cu_seqlens[-1] is 8, expected the number of tokens, 7"),
    ),
)
def test_prefill_boundaries(device, checked, operator, dtype, offsets, sentence):
    slope = (0.0, 1.0)  # shared, so that it fits any number of sequences
    refused(lambda: prefill(device, operator, offsets, dtype, slope), f"la2::{operator}: {sentence}")


@pytest.mark.parametrize("value", (None, "", "0"))
def test_off(device, monkeypatch, value):
    """Then a value that is not looked at anyway is not looked at."""
    if value is None:
        monkeypatch.delenv("LA2_CHECK", raising=False)
    else:
        monkeypatch.setenv("LA2_CHECK", value)
    decode(device, (1,), slope=(-0.5, 0.5))
    prefill(device, "forward", slope=(-0.5, 0.5))


def test_nothing_is_written_when_refused(device, checked):
    state = torch.ones(SLOTS, H, D, E, device=device)
    rows = [torch.ones(2, H, d, device=device) for d in (D, D, E)]
    with pytest.raises(RuntimeError, match="state_indices"):
        la2.decode(*rows, state, state_indices=ints(1, 1, device=device))
    assert (state == 1).all()


@pytest.mark.gpu
def test_a_capture_goes_through_unchecked(checked):
    """Nothing can be read while a graph is captured; what is captured replays as ever."""
    q, k, v = (torch.ones(2, H, d, device="cuda") for d in (D, D, E))
    pool, indices = torch.zeros(SLOTS, H, D, E, device="cuda"), ints(0, 1, device="cuda")
    slope = torch.zeros(H, device="cuda")
    la2.decode(q, k, v, pool.clone(), slope, state_indices=indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = la2.decode(q, k, v, pool, slope, state_indices=indices)
    indices.copy_(ints(3, -1))
    graph.replay()
    assert (out[0] == D).all() and not out[1].any()
    assert (pool[3] == 1).all() and not pool[:3].any()
    with pytest.raises(RuntimeError, match=r"la2::decode: state_indices\[1\] is 3 like state_indices\[0\]"):
        la2.decode(q, k, v, pool, slope, state_indices=ints(3, 3, device="cuda"))


@BOTH
@pytest.mark.parametrize(
    "count, indices, sentence",
    (
        ((2, 4), (0, 1), "num_accepted[1] is 4, expected 0 to 3, the number of draft tokens"),
        ((-1, 0), (0, 1), "num_accepted[0] is -1, expected 0 to 3, the number of draft tokens"),
        ((1, 1), (3, 3), "state_indices[1] is 3 like state_indices[0], expected a slot that no other row writes to"),
    ),
)
def test_commit(device, checked, dtype, count, indices, sentence):
    k, v = torch.ones(2, 3, H, D, device=device), torch.ones(2, 3, H, E, device=device)
    pool = torch.ones(SLOTS, H, D, E, device=device)
    count, indices = (ints(*x, dtype=dtype, device=device) for x in (count, indices))
    refused(lambda: la2.commit(k, v, pool, count, state_indices=indices), f"la2::commit: {sentence}")
    assert (pool == 1).all()


def test_verify_may_read_a_slot_twice(device, checked):
    q, k, v = (torch.ones(2, 3, H, d, device=device) for d in (D, D, E))
    pool = torch.ones(SLOTS, H, D, E, device=device)
    out = la2.verify(q, k, v, pool, torch.zeros(H, device=device), state_indices=ints(3, 3, device=device))
    assert torch.equal(out[0], out[1])
