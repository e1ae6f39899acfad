"""Pictures of results: one figure a file, with what was measured where written below it."""

from __future__ import annotations

import pathlib

_COLORS = ("#d9480f", "#495057", "#1864ab", "#2b8a3e", "#862e9c", "#e67700", "#0b7285", "#c2255c")
_MARKS = "osD^vP*X"


def missing() -> str | None:
    """Why there can be no picture, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed (pip install 'lightning-attn2-ext[demo]' brings it)"
    return None


def lines(
    path: pathlib.Path,
    series: dict[str, list[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    caption: str = "",
    log_x: bool = True,
    log_y: bool = True,
    marked: dict[str, tuple[float, float]] | None = None,
    dots: bool = True,
) -> None:
    """One line for each name; ``marked`` are points with a text beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for i, (name, points) in enumerate(series.items()):
        if points:
            style = {"marker": _MARKS[i % len(_MARKS)], "markersize": 4} if dots else {"linewidth": 1}
            axis.plot(*zip(*points, strict=True), color=_COLORS[i % len(_COLORS)], label=name, **style)
    for text, (at_x, at_y) in (marked or {}).items():
        axis.plot([at_x], [at_y], marker="o", markersize=11, fillstyle="none", color="black")
        axis.annotate(text, (at_x, at_y), xytext=(8, -14), textcoords="offset points", fontsize=8)
    if log_x:
        axis.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in series.values() for p in points})
        axis.set_xticks(ticks, [_short(t) for t in ticks], rotation=45 if len(ticks) > 8 else 0)
        axis.minorticks_off()
    if log_y:
        axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    if caption:
        figure.supxlabel(caption, fontsize=7, color="#495057")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _short(number: float) -> str:
    return f"{int(number) // 1024}K" if number >= 1024 and number % 1024 == 0 else f"{number:g}"


def crossing(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Where ``one`` falls below ``other`` for good, between two x that both have, on a log-log grid; else None."""
    import math

    a, b = dict(one), dict(other)
    shared = sorted(a.keys() & b.keys())
    if not shared or a[shared[-1]] >= b[shared[-1]]:
        return None
    behind = [i for i, x in enumerate(shared) if a[x] >= b[x]]
    if not behind:
        return None
    left, right = shared[behind[-1]], shared[behind[-1] + 1]
    gap_left, gap_right = math.log(a[left] / b[left]), math.log(a[right] / b[right])
    share = gap_left / (gap_left - gap_right)
    at = left * (right / left) ** share
    return at, a[left] * (a[right] / a[left]) ** share
