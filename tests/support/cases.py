"""Random problems. A `Case` is a few small numbers that hypothesis can shrink; `Case.make` turns it into tensors."""

import dataclasses

import torch
from hypothesis import strategies as st

# Rows in a chunk that any of the kernels might use. Lengths are drawn around their multiples.
CHUNKS = (16, 32, 64, 128, 256)

SLOPES = {
    "none": None,
    "zero": [0.0],
    "tiny": [1e-6],
    "usual": [0.5],
    "steep": [50.0],
    "extreme": [1e4],
    "mixed": [0.0, 1e4, 0.5, 1e-6, 50.0, 0.03],  # neighbours differ, so that a head with another's slope shows
}
LAYOUTS = ("bhnd", "bnhd", "qkv", "strided", "turned")
STATE_LAYOUTS = ("kv", "vk", "padded")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `lengths` are those of packed sequences; None means a dense batch of `batch` rows of `length`."""

    heads: int = 2
    batch: int = 1
    length: int = 1
    lengths: tuple[int, ...] | None = None
    key_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    slope: str = "usual"
    slope_per_seq: bool = False
    layout: str = "bhnd"
    state_layout: str | None = "kv"  # None: no initial state
    index_dtype: torch.dtype = torch.int32
    scale: float = 1.0
    seed: int = 0

    @property
    def num_seqs(self):
        return self.batch if self.lengths is None else len(self.lengths)

    def make(self, device="cpu"):
        return Inputs(self, device)


class Inputs:
    """The tensors of a case. `args` and `options` are what forward takes; grads are random cotangents."""

    def __init__(self, case, device):
        draw = _Draw(case.seed, device)
        rows = case.length if case.lengths is None else sum(case.lengths)
        batch = case.batch if case.lengths is None else 1
        dims = (case.key_dim, case.key_dim, case.value_dim)
        self.q, self.k, self.v = _laid_out(draw, case.layout, batch, case.heads, rows, dims, case.dtype)
        (self.grad_out,) = _laid_out(draw, case.layout, batch, case.heads, rows, dims[2:], case.dtype)
        acc = accumulation_dtype(case.dtype)
        self.slope = _slope(case, device, acc)
        shape = (case.num_seqs, case.heads, case.key_dim, case.value_dim)
        self.initial_state = None if case.state_layout is None else _state(draw, case.state_layout, shape, acc)
        self.grad_final_state = _state(draw, case.state_layout or "kv", shape, acc)
        self.cu_seqlens = None
        if case.lengths is not None:
            ends = [sum(case.lengths[:i]) for i in range(len(case.lengths) + 1)]
            self.cu_seqlens = torch.tensor(ends, dtype=case.index_dtype, device=device)
        self.scale = case.scale
        self.windows = None  # see tolerance.check_forward

    @property
    def args(self):
        return self.q, self.k, self.v, self.slope

    @property
    def options(self):
        return {"initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens, "scale": self.scale}

    @property
    def grads(self):
        return self.grad_out, self.grad_final_state

    def replace(self, **changes):
        """A copy with some tensors exchanged."""
        other = object.__new__(Inputs)
        other.__dict__.update(self.__dict__ | changes)
        return other

    def map(self, function):
        """A copy with `function` applied to every floating-point tensor except the slope."""
        return self.replace(
            **{
                name: function(x)
                for name, x in self.__dict__.items()
                if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "slope"
            }
        )


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def lengths(limit):
    """Token counts up to `limit`: small ones, and those one off, on and behind one to three chunks."""
    edges = {n * c + d for c in CHUNKS for n in (1, 2, 3) for d in (-1, 0, 1)}
    return st.one_of(st.integers(1, min(limit, 20)), st.sampled_from(sorted({1, *(e for e in edges if e <= limit)})))


def head_dims(limit):
    """Multiples of 8, tile sizes more often than others."""
    tiles = [d for d in (16, 32, 64, 128, 256) if d <= limit]
    return st.one_of(st.sampled_from(tiles), st.integers(1, limit // 8).map(lambda i: 8 * i))


@st.composite
def cases(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16), limit=400, dim_limit=128, layouts=LAYOUTS):
    packed = draw(st.booleans())
    case = {}
    if packed:
        pieces = st.lists(st.one_of(st.just(0), lengths(limit // 2)), max_size=5)
        case["lengths"] = tuple(draw(pieces.filter(lambda x: sum(x) <= limit)))
    else:
        case["batch"] = draw(st.integers(1, 2))
        case["length"] = draw(lengths(limit))
    return Case(
        heads=draw(st.integers(1, 6)),
        key_dim=draw(head_dims(dim_limit)),
        value_dim=draw(head_dims(dim_limit)),
        dtype=draw(st.sampled_from(dtypes)),
        slope=draw(st.sampled_from(sorted(SLOPES))),
        slope_per_seq=draw(st.booleans()),
        layout=draw(st.sampled_from(layouts)),
        state_layout=draw(st.sampled_from((None, *STATE_LAYOUTS))),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        scale=draw(st.sampled_from((1.0, 0.125, -0.7))),
        seed=draw(st.integers(0, 2**16)),
        **case,
    )


class _Draw:
    """Normal numbers from a seed, the same on every device."""

    def __init__(self, seed, device):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, *shape, dtype):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)


def _laid_out(draw, layout, batch, heads, rows, dims, dtype):
    """[B, H, N, dim] tensors for each of `dims`, stored as `layout` says."""
    if layout == "bhnd":
        return [draw(batch, heads, rows, dim, dtype=dtype) for dim in dims]
    if layout == "bnhd":
        return [draw(batch, rows, heads, dim, dtype=dtype).transpose(1, 2) for dim in dims]
    if layout == "qkv":  # views into one projection's output
        return list(draw(batch, rows, heads, sum(dims), dtype=dtype).transpose(1, 2).split(dims, -1))
    if layout == "strided":  # every second row of a storage that begins earlier and has columns behind
        return [draw(batch, heads, 2 * rows + 1, dim + 8, dtype=dtype)[:, :, 1::2, 4 : 4 + dim] for dim in dims]
    if layout == "turned":  # last stride is not one
        return [draw(batch, heads, dim, rows, dtype=dtype).mT for dim in dims]
    raise ValueError(layout)


def _state(draw, layout, shape, dtype):
    *outer, d, e = shape
    if layout == "kv":
        return draw(*shape, dtype=dtype)
    if layout == "vk":
        return draw(*outer, e, d, dtype=dtype).mT
    return draw(outer[0], outer[1] + 1, d, e + 3, dtype=dtype)[:, 1:, :, 2 : 2 + e]  # "padded"


def _slope(case, device, dtype):
    values = SLOPES[case.slope]
    if values is None:
        return None
    flat = [values[i % len(values)] for i in range(max(1, case.num_seqs) * case.heads + 1)]
    if not case.slope_per_seq:
        return torch.tensor(flat[: case.heads], dtype=dtype, device=device)
    # Shifted by one for each sequence, so that no two neighbours agree.
    table = [[values[(i + h) % len(values)] for h in range(case.heads)] for i in range(case.num_seqs)]
    return torch.tensor(table, dtype=dtype, device=device).reshape(case.num_seqs, case.heads)
