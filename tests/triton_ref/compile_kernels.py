"""Compile both Triton kernels for a GPU that need not be here: python compile_kernels.py 80|90."""

import os
import sys

sys.path.insert(0, os.getcwd())
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_ref.backward import reverse_kernel
from triton_ref.forward import forward_kernel, padded, slice_of

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what one block may use

FORWARD = ("q", "k", "v", "out", "weight"), ("slope", "initial_state", "final_state", "sums"), ("D", "E")
REVERSE = ("a", "b", "c", "out", "weight"), ("slope", "last_x", "first_x", "sums"), ("A", "F")


def compile_one(kernel, names, arch, dtype, dims, chunk):
    rows, singles, (inner, outer) = names
    types = (
        {n: f"*{dtype}" for n in rows} | {n: "*fp32" for n in singles} | {"bounds": "*i64", "scale": "fp32", "N": "i32"}
    )
    constants = {
        "H": 4,
        inner: dims[0],
        outer: dims[1],
        "C": chunk,
        f"BLOCK_{inner}": padded(dims[0]),
        f"BLOCK_{outer}": slice_of(dims[1]),
        "NUM_CHUNKS": 4,
        "HAS_WEIGHT": True,
        "PRECISION": "ieee",
    }
    order = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in order}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_stages": 1})


def main(arch):
    # fp32 at 256 takes ten seconds a kernel to compile; 128 shows the same shapes.
    for dtype, dims, chunk in (("fp32", (128, 64), 32), ("bf16", (8, 256), 32), ("fp16", (128, 128), 64)):
        for kernel, names in ((forward_kernel, FORWARD), (reverse_kernel, REVERSE)):
            shared = compile_one(kernel, names, arch, dtype, dims, chunk).metadata.shared
            print(kernel.__name__, dtype, dims, "shared", shared)
            assert shared <= SHARED_BYTES[arch]


main(int(sys.argv[1]))
