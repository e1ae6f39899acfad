"""What the CUDA compiler said of each kernel, and whether every kernel that the planner may ask for was built."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.builds import current_logs, newest_build

ROOT = Path(__file__).resolve().parents[2]

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
FAMILIES = {"simt", "sm80", "sm90"}
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def spills(log: str) -> dict[tuple[str, str], int]:
    """{(kernel, architecture): bytes spilled} of one ptxas log. A kernel whose line is missing counts as -1."""
    found, current = {}, None
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            current = entry.groups()
            found[current] = -1
        elif (amounts := SPILLS.search(line)) and current is not None:
            found[current] = max(found[current], 0) + sum(map(int, amounts.groups()))
            current = None  # what follows belongs to functions that were not inlined, or to the next kernel
    return found


def test_products_of_hopper_kernels_run_on():
    """ptxas says so where it made wgmma wait for each product: right results, and half the speed."""
    build = newest_build()
    if build is None:
        pytest.skip("no *.ptxas.log under build/: configure there with -DLA2_PTXAS_LOG=ON and build")
    logs = [log for log in current_logs(build) if "sm90" in str(log)]
    assert logs
    serialised = [log.name for log in logs if "wgmma.mma_async instructions are serialized" in log.read_text()]
    assert not serialised


def test_no_kernel_spills():
    build = newest_build()
    if build is None:
        pytest.skip("no *.ptxas.log under build/: configure there with -DLA2_PTXAS_LOG=ON and build")
    logs = current_logs(build)
    kernels = {}
    for log in logs:
        for kernel, amount in spills(log.read_text()).items():
            kernels[(*kernel, log.name)] = amount
    families = {name for kernel, *_ in kernels for name in FAMILIES if f"_{name}_kernel" in kernel}
    assert families == FAMILIES, f"{len(logs)} logs in {build} hold kernels of {families or 'no family'}"
    assert all(amount == 0 for amount in kernels.values()), "\n".join(
        f"{kernel} for {arch}: " + (f"{amount} bytes" if amount > 0 else "no report")
        for (kernel, arch, _), amount in sorted(kernels.items())
        if amount
    )


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 213 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90'
ptxas info    : Function properties for _Z1bPf
    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '_Z1cPf' for 'sm_90'
"""


def test_logs_are_understood():
    assert spills(LOG) == {("_Z1aPf", "sm_80"): 0, ("_Z1bPf", "sm_90"): 32, ("_Z1cPf", "sm_90"): -1}


# ---- instances


def configured_instances(text: str) -> set[tuple[str, int, int, str, bool, bool]]:
    """(dtype, tile_a, slice, split, slope_grad; sm90: both, silu) of every LA2_INSTANCE line."""
    rows = re.findall(r"^LA2_INSTANCE\((\w+), (\w+), (\d+), (\d+), ([\w:]+), (\d)(?:, (\d))?\)$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^LA2_INSTANCE\(", text, re.MULTILINE)), "a line of another form"
    return {(dtype, int(a), int(s), split, *(flag == "1" for flag in flags)) for _, dtype, a, s, split, *flags in rows}


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    """The list as CMakeLists.txt writes it. Of the project only the functions up to the options are run: the rest
    needs a torch, and a CUDA compiler for what is asked here in vain."""
    folder = tmp_path_factory.mktemp("la2_instances")
    head, options, _ = (ROOT / "CMakeLists.txt").read_text().partition("# ==== Options")
    assert options, "CMakeLists.txt has no section of options"
    (folder / "csrc").symlink_to(ROOT / "csrc")
    (folder / "CMakeLists.txt").write_text(re.sub(r"LANGUAGES \w+", "LANGUAGES NONE", head))
    done = subprocess.run(["cmake", "-S", folder, "-B", folder / "build"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        family: configured_instances((folder / f"build/instances/{family}/launch_instance.inc").read_text())
        for family in ("sm80", "sm90")
    }


def planner_shapes(file: str, table: str, entry: str) -> set[tuple[int, int]]:
    """(tile_a, slice) of a planner's table."""
    found = re.search(table + r"\[\] = \{(.*?)\n\};", (ROOT / "csrc/core" / file).read_text(), re.DOTALL)
    assert found, f"csrc/core/{file} has no {table}"
    shapes = {(int(a), int(s)) for a, s in re.findall(entry, found[1])}
    assert shapes
    return shapes


# out, gradients, and the slope's too
SM80_KINDS = (("0", False, False), ("1", False, False), ("1", True, False))
# out, of SiLU'd operands, dq, gradients alone, dk and dv at once
OUT, SILU, DQ, GRADIENT, BOTH = SM90_KINDS = (
    ("Split::kNone", False, False),
    ("Split::kNone", False, True),
    ("Split::kState", False, False),
    ("Split::kStateAndValues", False, False),
    ("Split::kStateAndValues", True, False),
)


def sm90_has(tile_a: int, size: int, kind: tuple[str, bool, bool]) -> bool:
    if kind == BOTH:
        return tile_a <= 128  # more columns of both gradients' operands do not fit
    if kind == SILU:
        return tile_a <= 192
    return kind != DQ or size == 128 or tile_a > 128


def test_every_shape_of_the_planner_is_built_and_no_other(instances):
    tables = {
        "sm80": planner_shapes("plan.cpp", "TileCost kSm80Tiles", r"\{\{(\d+), (\d+), \d+\}"),
        "sm90": planner_shapes("plan_sm90.cpp", "Sm90Cost kTrilinear", r"\{(\d+), (\d+), \d+\.\d+"),
    }
    for family, shapes in tables.items():
        kinds = SM80_KINDS if family == "sm80" else SM90_KINDS
        wanted = {
            (dtype, *shape, *kind)
            for dtype, shape, kind in itertools.product(("bf16", "fp16"), shapes, kinds)
            if family == "sm80" or sm90_has(*shape, kind)
        }
        built = instances[family]
        assert built == wanted, f"{family} missing: {sorted(wanted - built)}; in vain: {sorted(built - wanted)}"


@pytest.fixture(scope="module")
def plan_line():
    """Writes the plan for a problem on a GPU, as a user would ask for it."""
    import lightning_attn2_ext  # noqa: F401 - loads the library
    from lightning_attn2_ext import info

    def line(problem, device):
        text = info.plan_line(problem, device)
        assert not text.startswith("no plan"), text
        return text

    return line


@pytest.mark.parametrize("device", ("sm_80x108", "sm_86x84", "sm_89x128", "sm_90x132", "sm_100x148", "sm_120x170"))
def test_plans_name_instances_that_exist(plan_line, instances, device):
    """What the planner really picks, over head dims, lengths and GPUs."""
    dims = (8, 64, 72, 128, 136, 192, 200, 256)
    problems = itertools.product(
        ("bf16", "fp16"), dims, dims, (1, 4096, 262144), ("", ",silu", ",backward", ",backward,dslope")
    )
    for dtype, d, e, length, what in problems:
        line = plan_line(f"1,8,{length},{d},{e},{dtype}{what}", device)
        family = re.search(r": (sm80|sm90) ", line)[1]
        tiles = re.findall(r"(dk and dv )?tile (\d+) slice (\d+) chunk (\d+)", line)
        assert tiles, line
        for i, (pair, tile_a, size, _) in enumerate(tiles):
            is_gradient = "backward" in what
            if family == "sm80":
                wanted = {("1" if is_gradient else "0", last, False) for last in (False, "dslope" in what and i == 0)}
            elif not is_gradient:
                wanted = {SILU if what == ",silu" and "torch" not in line else OUT}
            elif pair:
                wanted = {BOTH}
            else:
                is_fused, has_dq = "dk and dv" in line, sm90_has(int(tile_a), int(size), DQ)
                wanted = (
                    {DQ if has_dq else GRADIENT} if is_fused else {GRADIENT, DQ} if i == 0 and has_dq else {GRADIENT}
                )
            for kind in wanted:
                needed = (dtype, int(tile_a), int(size), *kind)
                assert needed in instances[family], f"{line} needs {needed} of {family}"
