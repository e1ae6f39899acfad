"""``python -m lightning_attn2_ext info``: what is installed here, what was loaded and what would run."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import pathlib
import platform
import sys

import torch

_CPU_LIBRARY = "liblightning_attn2.so"
_CUDA_LIBRARY = "liblightning_attn2_cuda.so"


def version() -> str:
    import lightning_attn2_ext

    return getattr(lightning_attn2_ext, "__version__", "unknown")


def cuda_status() -> str:
    """Whether the CUDA library was loaded, or why not."""
    import lightning_attn2_ext

    return getattr(lightning_attn2_ext, "cuda_status", "unknown")


def direct_status() -> str:
    """Whether decode can go past torch's dispatcher, or why not."""
    from . import _direct

    return _direct.status


def libraries() -> dict[str, pathlib.Path]:
    """The libraries of this package that torch has loaded, by file name."""
    paths = map(pathlib.Path, torch.ops.loaded_libraries)
    return {p.name: p for p in paths if p.name in (_CPU_LIBRARY, _CUDA_LIBRARY)}


def _c_function(library: str, name: str):
    path = libraries().get(library)
    if path is None:
        return None
    try:
        return getattr(ctypes.CDLL(str(path)), name)  # already loaded: this only finds the handle again
    except (OSError, AttributeError):
        return None


def _c_string(library: str, name: str) -> str | None:
    function = _c_function(library, name)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    value = function()
    return None if value is None else value.decode("utf-8", "replace")


def build_info() -> dict | None:
    """How the CPU library was built, as it says itself."""
    text = _c_string(_CPU_LIBRARY, "la2_build_info")
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return {"raw": text}


def cpu_kernels() -> str | None:
    """The instruction set whose CPU kernels run: "avx512", "avx2" or "baseline"."""
    return _c_string(_CPU_LIBRARY, "la2_cpu_kernels")


def device_name(device: torch.device) -> str:
    """A CUDA device as the planner takes it: compute capability and number of SMs, such as "sm_90x132"."""
    p = torch.cuda.get_device_properties(device)
    return f"sm_{p.major}{p.minor}x{p.multi_processor_count}"


def plan_line(problem: str, device: str) -> str:
    """How a GPU such as "sm_90x132" would be used for ``problem``, in the planner's own words.

    ``problem`` is "B,H,N,Dk,Dv,dtype", and may go on with ",backward", ",dslope" and ",packed=NUM_SEQS". No GPU is
    needed to ask; LA2_PLAN is heeded. A line that starts with "no plan" says why there is none.
    """
    for library in (_CPU_LIBRARY, _CUDA_LIBRARY):
        function = _c_function(library, "la2_plan_line")
        if function is not None:
            break
    else:
        return "no plan: this build has no la2_plan_line"
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    buffer = ctypes.create_string_buffer(4096)
    code = function(problem.encode(), device.encode(), buffer, len(buffer))
    text = buffer.value.decode("utf-8", "replace")
    return text if code == 0 else f"no plan: {text}"


def kernel_family(major: int, minor: int) -> str:
    """The CUDA kernels that serve a compute capability."""
    if major < 8:
        return "none: compute capability 8.0 or later is needed"
    return "sm80 (bf16, fp16: tensor cores), simt (fp32, fp64, decode)"


def devices() -> list[torch.device]:
    """The CPU and every CUDA device that torch sees."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return found


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def lines() -> list[tuple[str, str]]:
    """What ``info`` prints: names and values."""
    loaded = libraries()
    build = build_info()
    result = [
        ("package", f"{version()} in {pathlib.Path(__file__).resolve().parent}"),
        ("build", "unknown" if build is None else ", ".join(f"{k} {v}" for k, v in build.items())),
        ("cpu library", str(loaded.get(_CPU_LIBRARY, "not loaded"))),
        ("cuda library", str(loaded[_CUDA_LIBRARY]) if _CUDA_LIBRARY in loaded else cuda_status()),
        ("direct decode", direct_status()),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("triton", f"{_package('triton')} (not needed)"),
        ("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, kernels {cpu_kernels() or 'unknown'}"),
    ]
    for device in devices()[1:]:
        p = torch.cuda.get_device_properties(device)
        served = kernel_family(p.major, p.minor) if _CUDA_LIBRARY in loaded else "no kernels: " + cuda_status()
        gib = p.total_memory / 2**30
        result.append(
            (str(device), f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {gib:.0f} GiB: {served}")
        )
    if len(devices()) == 1:
        result.append(("cuda devices", "none that torch can use"))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_attn2_ext info", description="What is installed, what was loaded and what would run."
    )
    parser.add_argument(
        "--plan",
        metavar="B,H,N,Dk,Dv,dtype",
        help="only say how a GPU would be used for this problem, such as 1,64,8192,128,128,bf16; "
        "may go on with ,backward ,dslope ,packed=NUM_SEQS",
    )
    parser.add_argument(
        "--device",
        metavar="sm_CCxSMS",
        help="GPU of --plan (default: the first that torch sees, else sm_90x132, a Hopper with 132 SMs)",
    )
    arguments = parser.parse_args(argv)
    if arguments.plan is None:
        facts = lines()
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            print(f"{name.ljust(width)}  {value}")
        return 0
    device = arguments.device
    if device is None:
        device = device_name(torch.device("cuda", 0)) if torch.cuda.is_available() else "sm_90x132"
    line = plan_line(arguments.plan, device)
    failed = line.startswith("no plan")
    print(line, file=sys.stderr if failed else sys.stdout)
    return 1 if failed else 0
