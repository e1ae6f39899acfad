"""Medians of times that were taken fairly: interleaved, on inputs that the call before did not have."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import time
from collections.abc import Callable

import torch

#: Rewritten between two timed calls on a GPU, larger than any L2 (H200: 50 MiB), and so often that the host is done
#: queueing the timed call before the device is done writing: launch costs of the host stay out of device times.
FLUSH_BYTES = 1 << 30
FASTEST_FLUSH_S = 0.2e-3  # of one, at 5 TB/s


def flushes_behind(host_s: float) -> int:
    """How often to flush before a call that keeps the host busy for ``host_s``: twice as long, at least twice."""
    return min(2 + math.ceil(2 * host_s / FASTEST_FLUSH_S), 100)


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep what is freed, as allocators for training do: otherwise every tensor of more than 32 MB
    comes from the system anew, and its zeroing of pages is charged to the call that writes them first. False
    where there is no such malloc."""
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(m_mmap_max, 0)) and bool(libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def cpu_medians(
    calls: dict[str, Callable], make_inputs: Callable[[int], object], repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each call, in rounds: every round makes new inputs and gives them to every call in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_idx in range(warmup + repeats):
        inputs = make_inputs(round_idx)
        for name, call in calls.items():
            start = time.perf_counter()
            result = call(inputs)
            seconds = time.perf_counter() - start
            del result
            if round_idx >= warmup:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


class CudaClock:
    """Median milliseconds of a call by CUDA events, its inputs no longer in L2."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def median(self, call: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
        host_s = 0.0
        for _ in range(warmup):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            call()
            host_s = time.perf_counter() - begin
        pairs, flushes = [], flushes_behind(host_s)
        for _ in range(repeats):
            for _ in range(flushes):
                self.flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            stop.record()
            del result
            pairs.append((start, stop))
        self.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class GraphClock:
    """Median milliseconds of a call in a CUDA graph of many, replayed back to back: no host time, nothing flushed."""

    CALLS = 20

    def __init__(self, device: torch.device):
        self.device = device

    def median(self, call: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(warmup):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.CALLS):
                result = call()
        graph.replay()
        pairs = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize(self.device)
        del result
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs) / self.CALLS


def host_microseconds(call: Callable[[], object], device: torch.device, calls: int = 500, rounds: int = 5) -> float:
    """What one call takes of the host that goes on without waiting for the device."""
    for _ in range(20):
        call()
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - begin) / calls)
    torch.cuda.synchronize(device)
    return statistics.median(taken) * 1e6


def host_microseconds_by_core(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """The same on every core that this thread may use, ascending: on a machine that is shared some take half as long
    again for everything, and a process stays where it is."""
    cores = os.sched_getaffinity(0)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    try:
        for core in sorted(cores):
            os.sched_setaffinity(0, {core})
            for name, call in calls.items():
                taken[name].append(host_microseconds(call, device, calls=200, rounds=3))
    finally:
        os.sched_setaffinity(0, cores)
    return {name: sorted(times) for name, times in taken.items()}
