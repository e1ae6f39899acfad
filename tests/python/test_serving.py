"""StatePool: whatever is done to it, in any order, its slots are those of a dictionary of tensors."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_attn2_ext.serving import StatePool

LAYERS, SLOTS, H, D, E = 2, 6, 2, 8, 16


class PoolMachine(RuleBasedStateMachine):
    """`model`: of every allocated slot its states, ``[layers, H, D, E]``."""

    device = "cpu"

    @initialize(dtype=st.sampled_from((torch.float32, torch.bfloat16)), layout=st.sampled_from(("kv", "vk")))
    def make(self, dtype, layout):
        self.pool = StatePool(LAYERS, SLOTS, H, D, E, dtype=dtype, layout=layout, device=self.device)
        self.model, self.peak, self.step = {}, 0, 0
        self.address = self.pool.tensor.data_ptr()
        self.pool.tensor.fill_(-1)  # what earlier owners left
        self.allocate(3, True)
        self.store(sorted(self.model))

    def zeros(self):
        return torch.zeros(LAYERS, H, D, E, dtype=self.pool.dtype, device=self.device)

    def some(self, data, most=SLOTS):
        return data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=most, unique=True))

    @rule(n=st.sampled_from((2, 1, 0, 3, 5)), reset=st.booleans())
    def allocate(self, n, reset):
        if n > SLOTS - len(self.model):
            with pytest.raises(RuntimeError, match=f"n is {n}, expected at most the {SLOTS - len(self.model)} free"):
                self.pool.allocate(n, reset=reset)
            return
        slots = self.pool.allocate(n, reset=reset)
        assert len(set(slots)) == n and not set(slots) & self.model.keys()
        for slot in slots:
            self.model[slot] = self.zeros() if reset else self.pool.tensor[:, slot].clone()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        slots = self.some(data, 2)
        self.pool.free(slots)
        for slot in slots:
            del self.model[slot]
            with pytest.raises(ValueError, match=f"slots has {slot}, expected slots that are allocated"):
                self.pool.free(slot)

    def store(self, slots):
        """As an operator does: through the layers' pools and a tensor of slots."""
        rows = self.pool.indices(slots).long()
        for layer, states in enumerate(self.pool):
            self.step += 1
            new = torch.arange(len(slots) * H * D * E, device=self.device).view(-1, H, D, E) % 97 + 100 * self.step
            states[rows] = new.to(states.dtype)
            for i, slot in enumerate(slots):
                self.model[slot][layer] = new[i]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def write(self, data):
        self.store(self.some(data))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def reset(self, data):
        slots = self.some(data)
        self.pool.reset(slots)
        self.model.update((slot, self.zeros()) for slot in slots)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def copy(self, data):
        dst = self.some(data)
        src = [data.draw(st.sampled_from(sorted(self.model))) for _ in dst]
        self.pool.copy(src, dst)
        self.model |= {to: self.model[of].clone() for of, to in zip(src, dst, strict=True)}

    @precondition(lambda self: self.model)
    @rule(data=st.data(), n=st.integers(0, 3))
    def fork(self, data, n):
        slot = data.draw(st.sampled_from(sorted(self.model)))
        if n > SLOTS - len(self.model):
            with pytest.raises(RuntimeError, match="free ones"):
                self.pool.fork(slot, n)
            return
        slots = self.pool.fork(slot, n)
        assert len(set(slots)) == n and not set(slots) & self.model.keys()
        self.model.update((new, self.model[slot].clone()) for new in slots)

    @rule(data=st.data())
    def refuse(self, data):
        """Slots that are free or not there change nothing, beside ones that are right too."""
        wrong = data.draw(st.sampled_from(sorted({-1, SLOTS, *range(SLOTS)} - self.model.keys())))
        slots = [*sorted(self.model)[:1], wrong]
        for call in (self.pool.free, self.pool.reset, lambda s: self.pool.copy(s, s), lambda s: self.pool.fork(s[-1])):
            with pytest.raises(ValueError if 0 <= wrong < SLOTS else IndexError, match=str(wrong)):
                call(slots)

    @invariant()
    def agrees(self):
        if not hasattr(self, "pool"):
            return
        self.peak = max(self.peak, len(self.model))
        report = self.pool.memory_report()
        assert (report.slots, report.used, report.peak) == (SLOTS, len(self.model), self.peak)
        assert self.pool.used == self.model.keys() and self.pool.num_free == report.free == SLOTS - len(self.model)
        assert self.pool.tensor.data_ptr() == self.address
        for slot, states in self.model.items():
            assert torch.equal(self.pool.tensor[:, slot], states)


class CudaPoolMachine(PoolMachine):
    device = "cuda"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)
TestCudaPool = pytest.mark.gpu(CudaPoolMachine.TestCase)
TestCudaPool.settings = settings(max_examples=20, stateful_step_count=30)


def test_layouts_and_sizes():
    kv = StatePool(3, 5, H, D, E)
    assert len(kv) == 3 and kv.tensor.shape == (3, 5, H, D, E) and kv[2].shape == (5, H, D, E) and kv.slots == 5
    assert kv[1].is_contiguous() and kv[1].data_ptr() == kv.tensor[1].data_ptr() and kv.dtype == torch.float32
    vk = StatePool(3, 5, H, D, E, layout="vk", dtype=torch.bfloat16)
    assert vk[0].shape == (5, H, D, E) and vk[0].stride()[-2:] == (1, D) and vk[0].mT.is_contiguous()
    slots = vk.allocate(2)
    report = vk.memory_report()
    assert report.slot_bytes == 3 * H * D * E * 2 and report.total_bytes == 5 * report.slot_bytes
    assert report.used_bytes == report.peak_bytes == 2 * report.slot_bytes
    vk.free(slots)
    assert vk.memory_report().used_bytes == 0 and vk.memory_report().peak == 2
    assert str(kv.memory_report()) == "0 of 5 slots in use (peak 0), 0.00293 MiB each: 0 of 0.01465 MiB"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        ({"slots": 0}, "StatePool: slots is 0, expected at least 1"),
        ({"key_dim": -8}, "StatePool: key_dim is -8, expected at least 1"),
        ({"dtype": torch.float16}, "StatePool: dtype is torch.float16, expected float32, bfloat16 or float64"),
        ({"layout": "dk"}, "StatePool: layout is 'dk', expected 'kv' or 'vk'"),
    ),
)
def test_refuses_to_be_made(changes, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        StatePool(**{"layers": 1, "slots": 1, "heads": 1, "key_dim": 8, "value_dim": 8} | changes)


def test_refusals():
    pool = StatePool(1, 4, H, D, E)
    slots = pool.allocate(3)
    for call, sentence in (
        (lambda: pool.allocate(-1), "StatePool.allocate: n is -1, expected at least 0"),
        (lambda: pool.free([slots[0], slots[0]]), f"StatePool.free: slots is [{slots[0]}, {slots[0]}], expected each"),
        (lambda: pool.copy(slots, slots[:2]), "StatePool.copy: dst has 2 slots, expected 3 as src"),
        (lambda: pool.copy(slots[:2], [slots[2]] * 2), "expected each slot once"),
        (lambda: pool.indices(slots, rows=2), "StatePool.indices: slots has 3 slots, expected at most 2 rows"),
        (lambda: pool.indices([3]), "StatePool.indices: slots has 3, expected slots that are allocated"),
        (lambda: pool.indices(slots, out=torch.zeros(4)), "out is torch.float32 [4], expected int32 or int64 [4]"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert sentence in str(caught.value)
    with pytest.raises(IndexError, match="slots has -2, expected slots from 0 to 3"):
        pool.indices([-2])
    assert pool.used == set(slots)


def test_indices(device):
    pool = StatePool(1, 4, H, D, E, device=device)
    a, b = pool.allocate(2)
    assert pool.indices([b, -1, a]).tolist() == [b, -1, a] and pool.indices([a]).dtype == torch.int32
    assert pool.indices([a], rows=3, dtype=torch.int64).tolist() == [a, -1, -1]
    out = torch.full((4,), 9, dtype=torch.int32, device=device)
    assert pool.indices([b, a], out=out) is out and out.tolist() == [b, a, -1, -1]
    assert pool.indices([]).shape == (0,) and out.device == pool.device


@pytest.mark.parametrize("layout", ("kv", "vk"))
def test_decode_in_a_layer(device, layout):
    """What the pool hands out is what the operator takes; other slots and other layers stay as they are."""
    torch.manual_seed(0)
    pool = StatePool(2, 5, H, D, E, layout=layout, device=device)
    slots = pool.allocate(3)
    rows = [torch.randn(3, H, d, device=device) for d in (D, D, E)]
    slope = torch.rand(H, device=device)
    pool.tensor.normal_()
    before = pool.tensor.clone()
    taken = pool.indices([slots[2], -1, slots[0]])
    out = torch.ops.la2.decode(*rows, pool[1], slope, state_indices=taken)
    states = before[1, [slots[2], slots[0]]]
    want = torch.ops.la2.decode(*(t[::2] for t in rows), states, slope)
    # Contiguous states and turned ones are summed in different orders.
    torch.testing.assert_close(out[::2], want, rtol=1e-5, atol=1e-5)
    assert not out[1].any()
    changed = {(1, slots[2]), (1, slots[0])}
    for layer in range(2):
        for slot in range(5):
            assert torch.equal(pool.tensor[layer, slot], before[layer, slot]) != ((layer, slot) in changed)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    """Under torch's own watch, with work queued that would take long to wait for."""
    pool = StatePool(2, 8, H, D, E, device="cuda")
    out = torch.zeros(8, dtype=torch.int32, device="cuda")
    pool.copy(*([slot] for slot in pool.allocate(2)))  # whatever is made only once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        slots = pool.allocate(3)
        pool.copy(slots[:1], slots[1:2])
        pool.reset(slots[:1])
        pool.free(pool.fork(slots[1], 2))
        pool.indices(slots, out=out)
        pool.memory_report()
        assert not torch.cuda.current_stream().query(), "the stream ran dry: this shows nothing"
    finally:
        torch.cuda.set_sync_debug_mode("default")
