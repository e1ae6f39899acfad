"""Slots for the states of requests, in one tensor that the operators read and write in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["MemoryReport", "StatePool"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_LAYOUTS = ("kv", "vk")


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What a pool holds. All sizes in bytes, of all layers together.

    Attributes:
        slots, used, free, peak: numbers of slots: all of them, those allocated now, the rest, and the most that were
            allocated at any time.
        slot_bytes: of one slot.
        total_bytes, used_bytes, peak_bytes: of so many slots. The tensor has total_bytes from the start.
    """

    slots: int
    used: int
    peak: int
    slot_bytes: int

    @property
    def free(self) -> int:
        return self.slots - self.used

    @property
    def total_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def used_bytes(self) -> int:
        return self.used * self.slot_bytes

    @property
    def peak_bytes(self) -> int:
        return self.peak * self.slot_bytes

    def __str__(self) -> str:
        mib = 1 << 20
        return (
            f"{self.used} of {self.slots} slots in use (peak {self.peak}), {self.slot_bytes / mib:.3g} MiB each: "
            f"{self.used_bytes / mib:.4g} of {self.total_bytes / mib:.4g} MiB"
        )


class StatePool:
    """A fixed number of slots, each with one state a layer, and the list of those that are free.

    ``pool.tensor`` is ``[layers, slots, H, D, E]``. ``pool[i]``, ``[slots, H, D, E]``, is what ``torch.ops.la2.decode``
    takes as ``state`` in layer i, with ``pool.indices(slots)`` as its ``state_indices``. One tensor for all layers, and
    layers outermost: a request has the same slot in each, so that one kernel resets it in all of them, while a layer
    alone is as dense as a pool of its own. (SGLang's pool has this order; vLLM hands every layer such a pool too.)

    The free list lives on the host, states on the device, and nothing here waits for the device: slots go there through
    pinned memory, in the order of the current stream. Addresses never change, as CUDA graphs need. No slot is kept
    for padding: its index is -1. Not for use by several threads at once.

    Args:
        layers, slots: how many of each.
        heads, key_dim, value_dim: H, D and E of a state; with tensor parallelism, those of this rank.
        dtype: float32; bfloat16, of half the size, into which a state is rounded at every write; or float64, for inputs
            of that dtype.
        layout: "kv", E has stride 1; or "vk", D has stride 1. The shape is ``[..., D, E]`` in either.
        device: of the tensor.

    Raises:
        ValueError: on a size below 1, a dtype or a layout that is none of these.

    Errors of the methods name the slot: RuntimeError when too few slots are free, ValueError on a slot that is not
    allocated, such as one that was freed before, and IndexError on one that the pool does not have. A method that
    raises has changed nothing.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        layout: str = "kv",
        device: torch.device | str | None = None,
    ):
        sizes = {"layers": layers, "slots": slots, "heads": heads, "key_dim": key_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"StatePool: {name} is {size}, expected at least 1")
        if dtype not in _DTYPES:
            raise ValueError(f"StatePool: dtype is {dtype}, expected float32, bfloat16 or float64")
        if layout not in _LAYOUTS:
            raise ValueError(f"StatePool: layout is {layout!r}, expected 'kv' or 'vk'")
        self.layers, self.slots, self.layout = layers, slots, layout
        dims = (key_dim, value_dim) if layout == "kv" else (value_dim, key_dim)
        storage = torch.zeros((layers, slots, heads, *dims), dtype=dtype, device=device)
        self.tensor = storage if layout == "kv" else storage.transpose(-2, -1)
        self._free = list(range(slots - 1, -1, -1))  # taken from its end: the slot freed last, which caches may hold
        self._used: set[int] = set()
        self._peak = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> frozenset[int]:
        """The slots that are allocated."""
        return frozenset(self._used)

    def __len__(self) -> int:
        """Number of layers."""
        return self.layers

    def __getitem__(self, layer: int) -> Tensor:
        """The pool of one layer, ``[slots, H, D, E]``: a view."""
        return self.tensor[layer]

    # ---- slots

    def allocate(self, n: int = 1, *, reset: bool = True) -> list[int]:
        """Take ``n`` slots, with states of zero.

        ``reset=False`` leaves what the last owner left, for slots that are written before they are read: by a prefill
        whose requests start from zero, or that reads a shared prefix's slot and writes here.

        Raises:
            ValueError: if n is negative. RuntimeError: if fewer than n slots are free.
        """
        if n < 0:
            raise ValueError(f"StatePool.allocate: n is {n}, expected at least 0")
        if n > len(self._free):
            raise RuntimeError(
                f"StatePool.allocate: n is {n}, expected at most the {len(self._free)} free ones of {self.slots} slots"
            )
        slots = [self._free.pop() for _ in range(n)]
        self._used.update(slots)
        self._peak = max(self._peak, len(self._used))
        if reset and slots:
            self.tensor.index_fill_(1, self.indices(slots, dtype=torch.int64), 0)
        return slots

    def free(self, slots: int | Iterable[int]) -> None:
        """Give slots back; their states stay until the next `allocate`.

        Raises:
            ValueError: on a slot that is not allocated (freed before), or named twice. IndexError: on one that is not
                there.
        """
        slots = self._checked("free", "slots", slots)
        if len(set(slots)) != len(slots):
            raise ValueError(f"StatePool.free: slots is {slots}, expected each slot once")
        self._used.difference_update(slots)
        self._free.extend(slots)

    def reset(self, slots: int | Iterable[int]) -> None:
        """Zero the states of allocated slots, in all layers.

        Raises:
            ValueError, IndexError: as `free`.
        """
        if slots := self._checked("reset", "slots", slots):
            self.tensor.index_fill_(1, self.indices(slots, dtype=torch.int64), 0)

    def copy(self, src: int | Iterable[int], dst: int | Iterable[int]) -> None:
        """``dst[i]`` gets the states of ``src[i]``, all as before the call: beams trade places so.

        Goes a layer at a time, and needs memory for the copied slots of one layer beside the pool.

        Raises:
            ValueError: if src and dst are of different lengths, or a slot is in dst twice; and as `free`.
            IndexError: as `free`.
        """
        src, dst = self._checked("copy", "src", src), self._checked("copy", "dst", dst)
        if len(src) != len(dst):
            raise ValueError(f"StatePool.copy: dst has {len(dst)} slots, expected {len(src)} as src")
        if len(set(dst)) != len(dst):
            raise ValueError(f"StatePool.copy: dst is {dst}, expected each slot once")
        if not src:
            return
        read, write = self.indices([*src, *dst], dtype=torch.int64).split(len(src))
        for layer in self.tensor:
            layer.index_copy_(0, write, layer.index_select(0, read))

    def fork(self, slot: int, n: int = 1) -> list[int]:
        """Take ``n`` slots with copies of the states of ``slot``: beams, or requests that share a prefix.

        Raises:
            ValueError, RuntimeError: as `allocate`. ValueError, IndexError: as `free`.
        """
        self._checked("fork", "slot", slot)
        slots = self.allocate(n, reset=False)
        self.copy([slot] * n, slots)
        return slots

    # ---- on the device

    def indices(
        self,
        slots: Sequence[int],
        *,
        rows: int | None = None,
        out: Tensor | None = None,
        dtype: torch.dtype = torch.int32,
    ) -> Tensor:
        """Slots as the operators take them, on the pool's device: ``[rows]``, filled up with -1, which is padding.

        Args:
            slots: one a row; -1 is padding here too.
            rows: of the result; by default as many as slots (or as out has).
            out: int32 or int64 ``[rows]`` on the pool's device, to write to, such as the input of a CUDA graph.
            dtype: int32 or int64, of a result that is not ``out``.

        Raises:
            ValueError: on more slots than rows, or an out that does not fit. ValueError, IndexError: as `free`, except
                for -1.
        """
        slots = list(slots)
        self._checked("indices", "slots", [slot for slot in slots if slot != -1])
        rows = (len(slots) if out is None else out.shape[0]) if rows is None else rows
        if len(slots) > rows:
            raise ValueError(f"StatePool.indices: slots has {len(slots)} slots, expected at most {rows} rows")
        if out is not None:
            if out.shape != (rows,) or out.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"StatePool.indices: out is {out.dtype} {list(out.shape)}, expected int32 or int64 [{rows}]"
                )
            dtype = out.dtype
        values = slots + [-1] * (rows - len(slots))
        if self.device.type == "cuda":  # from pageable memory the host would wait for the copy
            host = torch.tensor(values, dtype=dtype, pin_memory=True)
            return host.to(self.device, non_blocking=True) if out is None else out.copy_(host, non_blocking=True)
        host = torch.tensor(values, dtype=dtype, device=self.device)
        return host if out is None else out.copy_(host)

    def memory_report(self) -> MemoryReport:
        """Slots and bytes, in use and in all; reads nothing from the device."""
        slot_bytes = self.tensor[:, 0].numel() * self.tensor.element_size()
        return MemoryReport(self.slots, len(self._used), self._peak, slot_bytes)

    def _checked(self, method: str, name: str, slots: int | Iterable[int]) -> list[int]:
        slots = [slots] if isinstance(slots, int) else list(slots)
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise IndexError(f"StatePool.{method}: {name} has {slot}, expected slots from 0 to {self.slots - 1}")
            if slot not in self._used:
                raise ValueError(f"StatePool.{method}: {name} has {slot}, expected slots that are allocated")
        return slots

    def __repr__(self) -> str:
        shape = list(self.tensor.shape)
        return f"StatePool({shape} {self.dtype} {self.layout!r} on {self.device}, {len(self._used)} slots in use)"
