"""One JSON file for each measured point, found again by what was measured, where and at which commit."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import time

#: What a point is found by, beside its configuration and the commit.
_WHERE = ("hardware", "device", "dtype", "quick", "la2_plan")


def where(facts: dict, quick: bool) -> dict:
    """The machine and the form of a run, as the points of a run share them."""
    on_gpu = facts["device"].startswith("cuda")
    return {
        "hardware": facts["gpu"] if on_gpu else facts["cpu"],
        "device": "cuda" if on_gpu else "cpu",
        "dtype": facts["dtype"],
        "quick": quick,
        "la2_plan": os.environ.get("LA2_PLAN"),
    }


def flat(record: dict) -> dict:
    """Configuration and result in one row."""
    return record["config"] | record["result"]


class Store:
    """The points under ``folder``; ``here`` is `where` of this run, None to take that of the newest point."""

    def __init__(self, folder: str | pathlib.Path, here: dict | None = None, commit: str | None = None):
        self.folder, self.commit = pathlib.Path(folder), commit
        if here is None:
            newest = max(self._all(), key=lambda r: r["written"], default=None)
            if newest is None:
                raise SystemExit(f"bench paper: no points under {self.folder}, expected some to report on")
            here = {name: newest[name] for name in _WHERE}
        self.here = here

    def path(self, letter: str, config: dict) -> pathlib.Path:
        identity = json.dumps([letter, config, self.here, self.commit], sort_keys=True)
        words = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(str(v) for v in config.values())).strip("-")[:60]
        return self.folder / "points" / letter / f"{words}_{hashlib.sha256(identity.encode()).hexdigest()[:10]}.json"

    def has(self, letter: str, config: dict) -> bool:
        """Whether the point is there and need not be measured again: one that failed is."""
        record = _read(self.path(letter, config))
        return record is not None and "failed" not in record["result"]

    def write(self, letter: str, config: dict, result: dict, seconds: float, facts: dict) -> None:
        record = {"experiment": letter, "config": config, "result": result, "seconds": round(seconds, 3)}
        record |= self.here | {"commit": self.commit, "written": time.time(), "environment": facts}
        _write(self.path(letter, config), record)

    def records(self, letter: str) -> list[dict]:
        """The newest record of every configuration on this machine in this form, of whatever commit; newest last."""
        newest: dict[str, dict] = {}
        for record in sorted(self._all(letter), key=lambda r: r["written"]):
            if all(record[name] == self.here[name] for name in _WHERE):
                config = json.dumps(record["config"], sort_keys=True)
                newest.pop(config, None)  # it goes to the end
                newest[config] = record
        return list(newest.values())

    def rows(self, letter: str) -> list[dict]:
        return [flat(record) for record in self.records(letter)]

    def plan(self, points: dict[str, list[dict]] | None = None) -> dict[str, list[dict]]:
        """The configurations of each experiment on this machine, as the last run had them; ``points`` are kept."""
        path = self.folder / "points" / "plan.json"
        plans = _read(path) or []
        others = [p for p in plans if p["where"] != self.here]
        mine = next((p["points"] for p in plans if p["where"] == self.here), {})
        if points:
            mine = mine | points
            _write(path, [*others, {"where": self.here, "points": mine}])
        return mine

    def _all(self, letter: str = "*") -> list[dict]:
        found = (_read(path) for path in self.folder.glob(f"points/{letter}/*.json"))
        return [record for record in found if record is not None]


def _read(path: pathlib.Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or cut off in the middle of writing by an older version
        return None


def _write(path: pathlib.Path, content) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
