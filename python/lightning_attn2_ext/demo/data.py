"""The text: the sources of Python's standard library, or any folder, cut into training and held-out files."""

from __future__ import annotations

import collections
import dataclasses
import lzma
import math
import pathlib
import sysconfig
import zlib

import torch

#: Not read: other people's packages, the test suite, and generated tables, whose near-copies of one another
#: would sit on both sides of the split and flatter the result.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings", "pydoc_data"}
_SUFFIXES = {".py", ".txt", ".md", ".rst", ".c", ".h", ".cpp", ".rs", ".js", ".html", ".tex", ".csv", ".json"}


@dataclasses.dataclass
class Corpus:
    """Bytes of the training files and of the held-out files, uint8."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor
    num_train_files: int
    num_held_out_files: int


def _files(root: pathlib.Path, suffixes: set[str]) -> list[pathlib.Path]:
    found = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.suffix in suffixes and path.is_file() and not _SKIPPED_FOLDERS.intersection(inside.parts[:-1]):
            found.append(path)
    return found


def load(text_dir: str | None = None, max_bytes: int | None = None) -> Corpus:
    """Reads the corpus; a file in twelve is held out, by a hash of its name so that every run holds out the same."""
    if text_dir is None:
        root, suffixes = pathlib.Path(sysconfig.get_paths()["stdlib"]), {".py"}
        name = f"Python standard library sources ({root})"
    else:
        root, suffixes = pathlib.Path(text_dir), _SUFFIXES
        name = str(root)
        if not root.is_dir():
            raise SystemExit(f"demo: --text-dir is {text_dir}, which is no folder")
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    total = 0
    for path in _files(root, suffixes):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if not text:
            continue
        parts[zlib.crc32(path.relative_to(root).as_posix().encode()) % 12 == 0].append(text)
        total += len(text)
        if max_bytes is not None and total >= max_bytes and parts[True] and parts[False]:
            break
    if not parts[False] or not parts[True]:
        raise SystemExit(f"demo: found {total} bytes of text under {root}, too little to train on; give --text-dir")

    def joined(held_out: bool) -> torch.Tensor:
        return torch.frombuffer(bytearray(b"\n".join(parts[held_out])), dtype=torch.uint8)

    return Corpus(name, joined(False), joined(True), len(parts[False]), len(parts[True]))


def batch(text: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, length + 1]`` int64: windows at random places, one byte longer than the model reads."""
    starts = torch.randint(len(text) - length, (rows,), generator=generator)
    return torch.stack([text[i : i + length + 1] for i in starts.tolist()]).long()


def held_out_rows(text: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """``[rows, length]`` uint8, spread evenly over the held-out files."""
    length = min(length, len(text))
    rows = max(1, min(rows, len(text) // length))
    starts = [i * (len(text) - length) // max(rows - 1, 1) for i in range(rows)]
    return torch.stack([text[i : i + length] for i in starts])


def order0_entropy(text: bytes) -> float:
    """Bits per byte of an ideal code that knows how often each byte occurs in this very text."""
    counts = collections.Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors make of the text as one stream."""
    return {
        "zlib -9": 8 * len(zlib.compress(text, 9)) / len(text),
        "lzma": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
