"""What the papers say, in their numbers and on their hardware, and which measurement of ours stands beside it.

Sources: Lightning Attention-2 (arXiv 2401.04658), TransNormerLLM (2405.17381v2), the README of the former's kernels.
"""

from __future__ import annotations

import dataclasses

TABLE1_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 81920, 94208)
TABLE1_MODELS = ("LLaMA-FA2", "TNL-LA1", "TNL-LA2")
TABLE1_HARDWARE = "2x A100-80G (Lightning Attention-2, Table 1)"
#: Tokens/s/GPU at TABLE1_LENGTHS; None: out of memory.
TABLE1 = {
    ("0.4B", "LLaMA-FA2"): (35931, 32453, 28184, 21996, 15479, 9715, 5643, 4604, 4078),
    ("0.4B", "TNL-LA1"): (41789, 39043, 34894, 28627, 21112, 13852, 8247, 6824, 6012),
    ("0.4B", "TNL-LA2"): (38615, 38680, 38714, 38172, 37755, 37364, 38278, 38457, 38596),
    ("1B", "LLaMA-FA2"): (14897, 13990, 12644, 10887, 8468, 5836, 3820, 3167, None),
    ("1B", "TNL-LA1"): (21195, 20128, 18553, 16012, 12594, 8848, 5611, 4625, None),
    ("1B", "TNL-LA2"): (20052, 19967, 20009, 19841, 19805, 19691, 20077, 20186, None),
    ("3B", "LLaMA-FA2"): (7117, 6708, 6008, 4968, 3755, 2558, None, None, None),
    ("3B", "TNL-LA1"): (8001, 7649, 7117, 6152, 4859, 3512, None, None, None),
    ("3B", "TNL-LA2"): (7524, 7593, 7599, 7559, 7545, 7545, None, None, None),
}
FIFTEEN_TGS = 1620
README_MS = {"forward": 17.7, "backward": 74.6}  # B4 H32 N32768 D128


def table1(size: str, model: str, n: int) -> str:
    """The paper's cell for people."""
    row = TABLE1.get((size, model))
    if row is None or n not in TABLE1_LENGTHS:
        return "-"
    value = row[TABLE1_LENGTHS.index(n)]
    return "OOM" if value is None else f"{value:,}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """``ours`` is None where nothing was measured."""

    text: str
    theirs: str
    their_hardware: str
    experiment: str
    ours: str | None


def claims(rows: dict[str, list[dict]]) -> list[Claim]:
    """All of them, with what ``rows`` (by experiment) has to say."""
    return [*_operator(rows["a"]), *_training(rows["b"]), *_inference(rows["c"]), *_open(rows)]


def _percent(flat: tuple[int, int, float] | None) -> str | None:
    return flat and f"{100 * flat[2]:.1f} % (N = {flat[1]:,} against {flat[0]:,})"


def _operator(rows: list[dict]) -> list[Claim]:
    from . import lengths

    one = "1x A100-80G (Fig. 3)"
    readme = "A100-class, not named (README of the authors' kernels)"
    found = []
    for what in ("forward", "backward"):
        flat = lengths.flatness(rows, f"{what}_ms")
        found.append(
            Claim(f"operator, {what}: time linear in length", "curve without printed values", one, "a", _percent(flat))
        )
    peak = dict(lengths.series(rows, "backward_peak_bytes").get("la2 BHND", ()))
    memory = None
    if len(peak) > 1:
        memory = f"peak at N = {max(peak):,} is {peak[max(peak)] / peak[min(peak)]:.2f} of that at {min(peak):,}"
        memory += " (tokens constant)"
    found.append(Claim("operator: memory linear in length", "curve without printed values", one, "a", memory))
    at = next((r for r in rows if {k: r[k] for k in lengths.README} == lengths.README and r["op"] == "la2 BHND"), {})
    for what, ms in README_MS.items():
        value = at.get(f"{what}_ms")
        found.append(
            Claim(f"operator, {what}, B4 H32 N32768 D128", f"{ms} ms", readme, "a", value and f"{value:.3f} ms")
        )
        crossing = lengths.crossing(rows, f"{what}_ms")
        text = f"operator, {what}: the length from which it is faster than softmax attention"
        found.append(Claim(text, "about 4,096 (FlashAttention-2)", readme, "a", crossing))
    return found


def _training(rows: list[dict]) -> list[Claim]:
    from . import training

    found = []
    for size in ("0.4B", "1B", "3B"):
        theirs = TABLE1[size, "TNL-LA2"]
        last = max(i for i, x in enumerate(theirs) if x is not None)
        for i in (0, last):
            n = TABLE1_LENGTHS[i]
            mine = training.rate(rows, size, training.OURS, n)
            text = f"training {size}, N = {n:,}, tokens/s/GPU"
            found.append(Claim(text, f"{theirs[i]:,}", TABLE1_HARDWARE, "b", mine and f"{mine:,.0f}"))
        mine = [training.rate(rows, size, training.OURS, n) for n in (1024, 94208)]
        if last == len(TABLE1_LENGTHS) - 1 or all(mine):
            ratio = f"{theirs[last] / theirs[0]:.3f} (to {TABLE1_LENGTHS[last]:,})"
            ours = f"{mine[1] / mine[0]:.3f}" if all(mine) else None
            text = f"training {size}: speed at 94,208 over that at 1,024"
            found.append(Claim(text, ratio, TABLE1_HARDWARE, "b", ours))
    mine = [training.rate(rows, "0.4B", op, 94208) for op in (training.OURS, training.SOFTMAX)]
    ours = f"{mine[0] / mine[1]:.2f}x" if all(mine) else None
    theirs = f"{TABLE1['0.4B', 'TNL-LA2'][-1] / TABLE1['0.4B', 'LLaMA-FA2'][-1]:.2f}x"
    found.append(Claim("training 0.4B, N = 94,208: over softmax attention", theirs, TABLE1_HARDWARE, "b", ours))
    mine = training.rate(rows, "15B", training.OURS, training.FIFTEEN["length"])
    ours = mine and f"{mine:,.0f}, extrapolated from layers, no communication"
    hardware = "cluster of A100-80G, number of GPUs not given (section 4.3)"
    found.append(Claim("training 15B, N = 6,144, tokens/s/GPU", f"{FIFTEEN_TGS:,}", hardware, "b", ours))
    return found


def _inference(rows: list[dict]) -> list[Claim]:
    from . import inference

    flat = inference.flatness(rows)
    return [
        Claim(
            "inference: tokens/s do not depend on the position",
            "stated; 2,819.6 tokens/s for 7B behind 512 tokens",
            "A100-80G (TransNormerLLM, Fig. 5)",
            "c",
            _percent(flat),
        )
    ]


def _open(rows: dict[str, list[dict]]) -> list[Claim]:
    from . import ablation, layers, longest, loss

    a100 = "8x A100 (Table 2)"
    return [
        Claim(
            "quality equal to Lightning Attention-1 (training loss)",
            "2.228 against 2.229",
            a100,
            "f",
            loss.summary(rows["f"]),
        ),
        Claim(
            "how the block size should be chosen",
            "left open; near D (TransNormerLLM, Theorem 3.1), 64 in the authors' kernels",
            "-",
            "d",
            ablation.summary(rows["d"], "block"),
        ),
        Claim("share of intra-block and inter-block work", "left open", "-", "d", ablation.summary(rows["d"], "share")),
        Claim(
            "the longest sequence",
            "unlimited in principle; 131,072 shown (Fig. 1)",
            "A100-80G",
            "e",
            longest.summary(rows["e"]),
        ),
        Claim("other architectures", "left open", "-", "g", layers.summary(rows["g"])),
    ]
