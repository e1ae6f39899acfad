"""What the benchmarks need of a machine, CPU or GPU alike: a clock, a meter of memory, the speed of a copy, inputs."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import floor, report, timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_COPY_BYTES = 1 << 28


class CpuClock:
    """Median milliseconds of a call; `CudaClock` for a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        timing.keep_freed_memory()

    def median(self, call: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
        taken = []
        for i in range(warmup + repeats):
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
            del result
            if i >= warmup:
                taken.append(seconds * 1e3)
        return statistics.median(taken)


def clock_for(device: torch.device) -> CpuClock | timing.CudaClock:
    return timing.CudaClock(device) if device.type == "cuda" else CpuClock(device)


def copy_bandwidth(clock) -> float:
    """Bytes per second, read plus written, of a copy."""
    if clock.device.type == "cuda":
        return floor.copy_bandwidth(clock)
    source = torch.ones(_CPU_COPY_BYTES, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2 * _CPU_COPY_BYTES / (clock.median(lambda: target.copy_(source), repeats=5) * 1e-3)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds at any time beyond what was held before it, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes to the terminal that it starts and stops
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    held = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def qkv(b: int, h: int, n: int, d: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """q, k through SiLU, v and a gradient of the output, ``[B, H, N, D]``."""
    generator = torch.Generator(device).manual_seed(seed)
    results = []
    for is_activated in (True, True, False, False):  # one after the other: float32 is twice what is wanted
        x = torch.randn(b, h, n, d, generator=generator, device=device)
        results.append((F.silu(x, inplace=True) if is_activated else x).to(dtype))
    return results


def cuda_device(command: str) -> torch.device | None:
    """The CUDA device that is current; where torch sees none, says that ``command`` needs one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    print(f"{command} needs a CUDA device, and torch sees none")
    return None


def add_arguments(parser: argparse.ArgumentParser, outputs: bool = True) -> None:
    """Those that every benchmark here has; without ``outputs``, where it has its own way to write results down."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: as torch has it)")
    if outputs:
        parser.add_argument("--json", metavar="OUT", help="write the results there too")
        parser.add_argument("--plots", metavar="FOLDER", help="draw the results as PNG files in this folder")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds: to see that it runs")


def open_machine(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype, dict]:
    """Device, dtype and the facts for the record; says on the terminal where it runs.

    Raises:
        SystemExit: where the device is not there.
    """
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("bench: --device is cuda, and torch sees no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    facts = report.environment() | {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    print(report.describe(facts))
    return device, dtype, facts


def megabytes(number: int) -> str:
    return f"{number / 2**20:,.1f}"
