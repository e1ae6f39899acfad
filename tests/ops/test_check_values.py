"""LA2_CHECK=1: values that lie on the device are looked at, and each that is wrong has its sentence."""

import pathlib
import re
import shutil
import subprocess

import pytest
import torch

import lightning_attn2_ext  # noqa: F401 - defines torch.ops.la2

la2 = torch.ops.la2
ROOT = pathlib.Path(__file__).resolve().parents[2]
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


# ---- the functions, one by one


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """torch.ops.la2_check: csrc/ops/check_values.h as operators."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    folder, (torch_folder,) = tmp_path_factory.mktemp("check_values"), torch.__path__
    target = re.search(r'set\(LA2_TORCH_TARGET "(\w+)"', (ROOT / "CMakeLists.txt").read_text())[1]
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-DTORCH_TARGET_VERSION={target}"]
    command += ["-isystem", f"{torch_folder}/include", "-Wl,--no-as-needed", f"-L{torch_folder}/lib"]
    command += [ROOT / "tests/ops/check_values_ops.cpp", ROOT / "csrc/ops/check_values.cpp"]
    command += ["-ltorch_cpu", "-o", folder / "check_values.so"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    torch.ops.load_library(str(folder / "check_values.so"))
    return torch.ops.la2_check


@BOTH
def test_slots(device, check, dtype):
    def slots(values, for_writing):
        return check.slots(ints(*values, dtype=dtype, device=device), 4, for_writing)

    slots((3, -1, 0, -1, -7), True)
    slots((3, 3), False)
    slots((), True)
    refused(lambda: slots((0, 4), False), "la2::op: slots[1] is 4, expected less than the 4 slots of state")
    refused(
        lambda: slots((0, 3, -1, 3), True),
        "la2::op: slots[3] is 3 like slots[1], expected a slot that no other row writes to",
    )
    every_second = torch.stack((ints(0, 1, 2, dtype=dtype), ints(9, 9, 9, dtype=dtype)), 1).to(device)[:, 0]
    check.slots(every_second, 4, True)


@BOTH
def test_boundaries_that_need_not_cover_all(device, check, dtype):
    def boundaries(*values):
        return check.seq_offsets(ints(*values, dtype=dtype, device=device), 10, False)

    boundaries(2, 2, 7)
    boundaries(0)
    boundaries(0, 10)
    refused(lambda: boundaries(-1, 4), "la2::op: cu_seqlens[0] is -1, expected at least 0")
    refused(lambda: boundaries(0, 4, 3), "la2::op: cu_seqlens[2] is 3, expected at least cu_seqlens[1] = 4")
    refused(lambda: boundaries(0, 11), "la2::op: cu_seqlens[-1] is 11, expected at most the number of tokens, 10")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_slopes(device, check, dtype):
    for right in (torch.zeros(3, dtype=dtype), torch.full((2, 3), 1e30, dtype=dtype), torch.zeros(0, 3, dtype=dtype)):
        check.slopes(right.to(device))
    turned = torch.tensor([[0.0, 1.0], [NAN, 2.0]], dtype=dtype, device=device).t()
    refused(lambda: check.slopes(turned), "la2::op: slope[0, 1] is nan, expected a finite number that is not negative")


@BOTH
def test_counts(device, check, dtype):
    def counts(*values):
        return check.counts(ints(*values, dtype=dtype, device=device), 5)

    counts(0, 5, 3)
    refused(lambda: counts(0, 6), "la2::op: num_accepted[1] is 6, expected 0 to 5, the number of draft tokens")
    refused(lambda: counts(-1), "la2::op: num_accepted[0] is -1, expected 0 to 5, the number of draft tokens")


# Three requests of 4, 0 and 5 tokens with 2, 0 and 2 snapshots, against 9 slots.
REQUESTS = {
    "cu_seqlens": (0, 4, 4, 9),
    "read_slots": (0, -1, 2),
    "write_slots": (3, 1, 2),
    "snapshot_offsets": (0, 2, 2, 4),
    "snapshot_tokens": (0, 4, 2, 2),
    "snapshot_slots": (5, 6, -1, 8),
}
RIGHT_REQUESTS = {
    "as they are": {},
    "tokens behind the last": {"tokens": 12},
    "no slots": {"read_slots": None, "write_slots": None},
    "write where they read": {"write_slots": None},
    "two read one slot": {"read_slots": (7, 7, 7)},
    "no snapshots": {"snapshot_offsets": None, "snapshot_tokens": None, "snapshot_slots": None},
    "snapshots that nobody has": {"snapshot_tokens": (0, 4, 2, 2, 99), "snapshot_slots": (5, 6, -1, 8, 99)},
    "reads nothing where another writes": {"read_slots": (2, 1, 0), "has_initial_state": (False, True, True)},
}
TWICE = "expected a slot that is not written twice"
WRONG_REQUESTS = {
    "boundaries": ({"cu_seqlens": (0, 4, 3, 9)}, "cu_seqlens[2] is 3, expected at least cu_seqlens[1] = 4"),
    "too few tokens": ({"tokens": 8}, "cu_seqlens[-1] is 9, expected at most the number of tokens, 8"),
    "read slot": ({"read_slots": (0, 9, 2)}, "read_slots[1] is 9, expected less than the 9 slots of state"),
    "write slot": ({"write_slots": (3, 1, 10)}, "write_slots[2] is 10, expected less than the 9 slots of state"),
    "one write slot": ({"write_slots": (3, 2, 2)}, f"write_slots[2] is 2 like write_slots[1], {TWICE}"),
    "one slot for both": (
        {"read_slots": (3, 0, 3), "write_slots": None},
        f"read_slots[2] is 3 like read_slots[0], {TWICE}",
    ),
    "a snapshot over a request": (
        {"snapshot_slots": (5, 2, -1, 8)},
        f"snapshot_slots[1] is 2 like write_slots[2], {TWICE}",
    ),
    "a snapshot over a request without slots": (
        {"read_slots": None, "write_slots": None, "snapshot_slots": (5, 1, -1, 8)},
        f"snapshot_slots[1] is 1 like the slot of request 1, {TWICE}",
    ),
    "snapshots over each other": (
        {"snapshot_slots": (5, 6, -1, 5)},
        f"snapshot_slots[3] is 5 like snapshot_slots[0], {TWICE}",
    ),
    "snapshot slot": (
        {"snapshot_slots": (5, 6, -1, 9)},
        "snapshot_slots[3] is 9, expected less than the 9 slots of state",
    ),
    "snapshot offsets fall": (
        {"snapshot_offsets": (0, 2, 1, 4)},
        "snapshot_offsets[2] is 1, expected at least snapshot_offsets[1] = 2",
    ),
    "snapshot offsets past the end": (
        {"snapshot_offsets": (0, 2, 2, 5)},
        "snapshot_offsets[-1] is 5, expected at most the number of snapshots, 4",
    ),
    "snapshot offset below": ({"snapshot_offsets": (-1, 2, 2, 4)}, "snapshot_offsets[0] is -1, expected at least 0"),
    "snapshot behind the request": (
        {"snapshot_tokens": (0, 5, 2, 2)},
        "snapshot_tokens[1] is 5, expected 0 to 4, the tokens of request 0",
    ),
    "snapshot before the request": (
        {"snapshot_tokens": (0, 4, -1, 2)},
        "snapshot_tokens[2] is -1, expected 0 to 5, the tokens of request 2",
    ),
    "snapshots that fall": (
        {"snapshot_tokens": (3, 2, 2, 2)},
        "snapshot_tokens[1] is 2, expected at least snapshot_tokens[0] = 3 of the same request",
    ),
    "reads where another writes": (
        {"read_slots": (2, -1, 0), "has_initial_state": (True, True, True)},
        "read_slots[0] is 2 like write_slots[2], expected a slot that no other request writes to",
    ),
    "reads where another keeps a snapshot": (
        {"read_slots": (8, -1, 2)},
        "read_slots[0] is 8 like snapshot_slots[3], expected a slot that no other request writes to",
    ),
}


def requests(check, device, dtype, changes):
    named = {"tokens": 9, "num_slots": 9, **REQUESTS, **changes}
    for name, value in named.items():
        if isinstance(value, tuple):
            kind = torch.bool if name == "has_initial_state" else dtype
            named[name] = torch.tensor(value, dtype=kind, device=device)
    return check.requests(named.pop("cu_seqlens"), named.pop("tokens"), named.pop("num_slots"), **named)


@BOTH
@pytest.mark.parametrize("name", RIGHT_REQUESTS)
def test_requests(device, check, dtype, name):
    requests(check, device, dtype, RIGHT_REQUESTS[name])


@BOTH
@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_wrong_requests(device, check, dtype, name):
    changes, sentence = WRONG_REQUESTS[name]
    refused(lambda: requests(check, device, dtype, changes), f"la2::op: {sentence}")
