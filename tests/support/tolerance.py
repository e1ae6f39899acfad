"""How far a result may be from the truth.

The truth is `naive.quadratic` in float64, differentiated by autograd. The yardstick is the same mathematics in plain
PyTorch with the operands of each product rounded to the problem's dtype and sums in the accumulation dtype: a kernel
may be 1.5 times as far off, plus a floor. Which chunks it takes, and in which order it sums over head dims, must not
decide: it is the worst of several. The floor is for small tensors, where the yardstick may be exact by luck. It
has two parts, for each element x = sum of terms:

    u_operand * max(|x|, sqrt(sum of terms^2))     one rounding of the result, or of each term on its own
    2 u_sum * sum of |terms|                       the order of summation

Both sums are the operator itself on squared or absolute inputs (squares decay with twice the slope), so they cost
nothing to derive. Each is compared per sequence and head, in the 2-norm and in the largest element: a small head next
to a large one is held to its own size.
"""

import contextlib

import torch

from tests.support.cases import accumulation_dtype
from triton_ref import naive

MARGIN = 1.5
# Of the yardstick: chunks, at whose edges it rounds, and seeds of the order of head dims (None: as they are). The
# largest error of 128 float32 sums of 128 products, one added after the other, is 0.8 to 4.4 u times the largest sum of
# |terms|, as the order will have it (300 orders); torch's own on a CPU 0.9. What has a seed runs on the CPU, so that
# the yardsticks are not all of one library.
YARDSTICKS = ((16, None), (64, None), (256, None), (64, 1), (64, 2))

VALUES = ("out", "final_state")
GRADIENTS = ("dq", "dk", "dv", "dslope", "dinitial_state")


@contextlib.contextmanager
def one_thread():
    """Products here are small; several threads cost more than they save, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def forward_truth(inputs):
    """{name: float64 tensor} of the values."""
    with torch.no_grad():
        return dict(zip(VALUES, naive.quadratic(*inputs.args, **inputs.options), strict=True))


@one_thread()
def gradient_truth(inputs, form=naive.quadratic):
    """{name: float64 tensor} of values and gradients, by autograd."""
    values, leaves = _graph(inputs, form)
    loss = (values["out"] * inputs.grad_out.double()).sum()
    loss = loss + (values["final_state"] * inputs.grad_final_state.double()).sum()
    grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True, materialize_grads=True)
    return {k: x.detach() for k, x in values.items()} | dict(zip(leaves, grads, strict=True))


def check_forward(inputs, out, final_state=None, *, against=None):
    """Assert that values of the problem `inputs` are as close to the truth as its dtype allows.

    `against`, other values (out, final_state) of the same problem, takes the place of the truth; since both may then
    be off, the difference may be twice as large. With `inputs.windows`, pairs (first row, row behind the last), only
    those rows of out count, each window by itself.
    """
    _check(inputs, dict(zip(VALUES, (out, final_state), strict=True)), forward_truth, _plain_forward, against)


def check_backward(inputs, grads, *, against=None):
    """Assert the same of gradients (dq, dk, dv, dslope, dinitial_state). None is skipped; the last two must be None or
    empty where `inputs` has no slope or state."""
    got = dict(zip(GRADIENTS, grads, strict=True))
    for name, source in (("dslope", inputs.slope), ("dinitial_state", inputs.initial_state)):
        if source is None:
            assert got[name] is None or got[name].shape == (0,), f"{name} without its input: {got[name]}"
            got[name] = None
    _check(inputs, got, gradient_truth, _plain_backward, against)


@one_thread()
def _check(inputs, got, truth_of, plain_of, against):
    got = {name: x for name, x in got.items() if x is not None}
    wants = truth = truth_of(inputs)
    if against is not None:
        wants = dict(zip(VALUES if truth_of is forward_truth else GRADIENTS, against, strict=True))
    plain = [_reordered(plain_of, inputs, *yardstick) for yardstick in YARDSTICKS]
    squares, sums = _magnitudes(inputs, truth_of)
    operand, total = inputs.q.dtype, accumulation_dtype(inputs.q.dtype)
    failures = []
    for name, x in got.items():
        want = wants[name].double()
        assert x.shape == want.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(want.shape)}"
        if not want.numel():
            continue
        assert torch.isfinite(x).all(), f"{name} has {int((~torch.isfinite(x)).sum())} values that are not finite"
        floor = roundoff(operand) * torch.maximum(truth[name].abs(), squares[name].clamp(min=0).sqrt())
        floor = floor + 2 * roundoff(total) * sums[name].abs() + tiniest(x.dtype)
        for norm in (_two_norm, _largest):
            error = norm(x.double() - want, name, inputs)
            limit = norm(floor, name, inputs)
            limit = limit + MARGIN * torch.stack([norm(p[name] - truth[name], name, inputs) for p in plain]).amax(0)
            limit = limit if against is None else 2 * limit
            if not (error <= limit).all():
                at = int((error / limit.clamp(min=torch.finfo(limit.dtype).tiny)).argmax())
                failures.append(
                    f"{name}: {norm.__name__[1:]} of the error is {error.flatten()[at]:.3e} in group {at} "
                    f"(sequence, head), allowed {limit.flatten()[at]:.3e}; of the truth "
                    f"{norm(want, name, inputs).flatten()[at]:.3e}"
                )
    assert not failures, "\n".join(failures)


def roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def tiniest(dtype):
    """Below the smallest normal number rounding is absolute, and a device may flush to zero."""
    return torch.finfo(dtype).smallest_normal


def _two_norm(x, name, inputs):
    return _groups(x, name, inputs, lambda y: (y * y).sum((-1, -2)).sqrt())


def _largest(x, name, inputs):
    return _groups(x, name, inputs, lambda y: y.abs().amax((-1, -2)) if y.numel() else y.new_zeros(y.shape[:2]))


def _groups(x, name, inputs, reduce):
    """Reduce all but sequence and head: [num_seqs, H], or with windows as if each were a sequence."""
    if name == "dslope":
        return x.abs()
    if name in ("final_state", "dinitial_state"):
        return reduce(x)
    spans = inputs.windows
    if spans is None:
        ends = [0, x.shape[2]] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
        spans = list(zip(ends, ends[1:], strict=False))
    return torch.cat([reduce(x[:, :, lo:hi]) for lo, hi in spans] or [x.new_zeros(0, x.shape[1])])


def _reordered(plain_of, inputs, chunk, seed):
    """plain_of(inputs, chunk) with its columns in an order drawn from the seed, its values' columns back in theirs."""
    if seed is None:
        return plain_of(inputs, chunk)
    device, slope, ends = inputs.q.device, inputs.slope, inputs.cu_seqlens
    inputs = inputs.map(torch.Tensor.cpu)
    generator = torch.Generator().manual_seed(seed)
    d, e = (torch.randperm(x.shape[-1], generator=generator) for x in (inputs.q, inputs.v))
    states = {n: getattr(inputs, n) for n in ("initial_state", "grad_final_state")}
    other = inputs.replace(
        q=inputs.q[..., d],
        k=inputs.k[..., d],
        v=inputs.v[..., e],
        grad_out=inputs.grad_out[..., e],
        slope=slope if slope is None else slope.cpu(),
        cu_seqlens=ends if ends is None else ends.cpu(),
        **{n: x if x is None else x[..., d, :][..., e] for n, x in states.items()},
    )
    d, e = d.argsort(), e.argsort()
    back = {"dq": d, "dk": d, "out": e, "dv": e}
    values = {n: x[..., back[n]] if n in back else x for n, x in plain_of(other, chunk).items()}
    values = {n: x[..., d, :][..., e] if n.endswith("_state") else x for n, x in values.items()}
    return {n: x.to(device) for n, x in values.items()}


def _plain_forward(inputs, chunk):
    options = {"chunk": chunk, "dtype": accumulation_dtype(inputs.q.dtype), "operand_dtype": inputs.q.dtype}
    out, final_state = naive.chunked(*inputs.args, **inputs.options, **options)
    return {"out": out.to(inputs.q.dtype).double(), "final_state": final_state.double()}


def _plain_backward(inputs, chunk):
    options = {"chunk": chunk, "dtype": accumulation_dtype(inputs.q.dtype), "operand_dtype": inputs.q.dtype}
    grads = naive.backward_chunked(*inputs.grads, *inputs.args, **inputs.options, **options)
    rounded = [g.to(inputs.q.dtype) for g in grads[:3]] + list(grads[3:])
    return {n: g.double() for n, g in zip(GRADIENTS, rounded, strict=True) if g is not None}


def _magnitudes(inputs, truth_of):
    """(sum of squared terms, sum of absolute terms) for each value or gradient."""
    slope = None if inputs.slope is None else inputs.slope.double()
    squared = inputs.map(lambda x: x.double() ** 2)
    squared = squared.replace(slope=None if slope is None else 2 * slope, scale=inputs.scale**2)
    absolute = inputs.map(lambda x: x.double().abs()).replace(slope=slope, scale=abs(inputs.scale))
    squares = truth_of(squared)
    if "dslope" in squares:
        # Its terms are n w, their squares n^2 w^2: the second derivative, by its slope, of the squared loss. Besides,
        # rounding a flow where it leaves and where it arrives leaves a difference that (17) carries on and (18)
        # counts with every token up to the end of the sequence: up to N w for a pair of any distance.
        squares["dslope"] = _second_slope_derivative(squared) + _carried(squared, squares)
    return squares, truth_of(absolute)


def _carried(squared, values):
    """N^2 times the sum of w^2 of each sequence and head, in the shape of the slope."""
    whole = squared.replace(windows=None)  # the slope's gradient knows no windows
    flow = _groups(values["out"] * squared.grad_out, "out", whole, lambda x: x.sum((-1, -2)))
    flow = flow + (values["final_state"] * squared.grad_final_state).sum((-1, -2))
    ends = squared.cu_seqlens
    tokens = squared.q.new_tensor([squared.q.shape[2]]) if ends is None else (ends[1:] - ends[:-1]).double()
    carried = tokens[:, None] ** 2 * flow
    return carried.sum(0) if squared.slope.dim() == 1 else carried


def _second_slope_derivative(inputs):
    values, leaves = _graph(inputs, naive.quadratic)
    loss = (values["out"] * inputs.grad_out).sum() + (values["final_state"] * inputs.grad_final_state).sum()
    (first,) = torch.autograd.grad(loss, leaves["dslope"], create_graph=True)
    if not first.requires_grad:
        return torch.zeros_like(first)
    (second,) = torch.autograd.grad(first.sum(), leaves["dslope"], allow_unused=True, materialize_grads=True)
    return second


def _graph(inputs, form):
    """Values as functions of float64 leaves: (values, {gradient name: leaf})."""
    given = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dslope": inputs.slope}
    given["dinitial_state"] = inputs.initial_state
    leaves = {n: x.detach().double().requires_grad_() for n, x in given.items() if x is not None}
    options = inputs.options | {"initial_state": leaves.get("dinitial_state")}
    values = form(leaves["dq"], leaves["dk"], leaves["dv"], leaves.get("dslope"), **options)
    return dict(zip(VALUES, values, strict=True)), leaves
