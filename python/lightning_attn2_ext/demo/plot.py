"""One picture: the constant speed and the training curve."""

from __future__ import annotations

import pathlib

from .speed import OURS, SOFTMAX

_LABELS = {OURS: "torch.ops.la2.forward", SOFTMAX: "scaled_dot_product_attention"}
_COLORS = {OURS: "#d9480f", SOFTMAX: "#495057"}


def draw(path: pathlib.Path, points, curve, baselines: dict[str, float], caption: str) -> str | None:
    """Writes the PNG; returns None, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed (pip install 'lightning-attn2-ext[demo]' brings it)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, values in points.items():
        if values:
            lengths, rates = zip(*values, strict=True)
            left.plot(lengths, rates, marker="o", color=_COLORS[name], label=_LABELS[name])
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    ticks = sorted({n for values in points.values() for n, _ in values})
    left.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    left.set_xlabel("context length")
    left.set_ylabel("tokens per second (forward, mixer alone)")
    left.set_title("Speed against length")
    left.legend(frameon=False)

    if curve.train:
        seen, bits = zip(*curve.train, strict=True)
        smooth, average = [], bits[0]
        for b in bits:
            average = 0.95 * average + 0.05 * b
            smooth.append(average)
        right.plot(seen, bits, color="#ffd8a8", linewidth=0.8)
        right.plot(seen, smooth, color="#d9480f", label="training")
    if curve.held_out:
        seen, bits = zip(*curve.held_out, strict=True)
        right.plot(seen, bits, marker="s", color="#1864ab", label="held out")
    for (name, bits), style in zip(baselines.items(), ("--", "-.", ":"), strict=False):
        right.axhline(bits, color="#868e96", linestyle=style, linewidth=1, label=f"{name}, held out")
    right.set_ylim(1.0, 6.0)
    right.set_xlabel("bytes read")
    right.set_ylabel("bits per byte")
    right.set_title("Training")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=8, color="#495057")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None
