"""What a build under build/ has left behind: ptxas's reports of its CUDA objects (-DLA2_PTXAS_LOG=ON)."""

from pathlib import Path

BUILDS = Path(__file__).resolve().parents[2] / "build"


def newest_build() -> Path | None:
    """The build folder with the newest log."""
    logs = max(BUILDS.rglob("*.ptxas.log"), key=lambda path: path.stat().st_mtime, default=None)
    return next((p for p in logs.parents if (p / "CMakeCache.txt").exists()), None) if logs else None


def current_logs(build: Path) -> list[Path]:
    """Logs of objects that the build still makes: one left over from a renamed instance says nothing."""
    rules = (build / "build.ninja").read_text()
    return [
        log for log in build.rglob("*.ptxas.log") if str(log.relative_to(build)).removesuffix(".ptxas.log") in rules
    ]
