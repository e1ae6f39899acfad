"""Whether machine code leaves alone the registers from which wgmma still reads and to which it still writes.

A product with its A operand in registers reads them until it is waited for, and ptxas has been seen to give them to
others where issue and wait are in different passes of a loop (csrc/kernels/DESIGN.md, "ptxas and products in flight at
the end of a loop"): right code in PTX, and results that are wrong now and then.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.builds import current_logs, newest_build

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
TILE = re.compile(r"HGMMA\.64x(\d+)x")
FAR = 8  # groups committed since: more than any kernel leaves in flight


class Instruction:
    def __init__(self, address: str, guard: str | None, opcode: str, operands: str):
        self.address, self.is_guarded, self.opcode = int(address, 16), guard is not None, opcode
        self.operands = [x.strip() for x in operands.split(",")]
        self.text = f"{opcode} {operands.strip()}"
        self.is_product = opcode.startswith("HGMMA")
        self.commits = self.is_product and "gsb0" in self.operands
        #: how many groups may still be in flight behind it
        waits = re.fullmatch(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", self.text)
        self.leaves = int(waits[1], 16) if waits else None

    def destination(self) -> range:
        """The registers that it writes; of a product: its sums."""
        names = [x for x in self.operands if not re.fullmatch(r"!?U?P(T|\d)", x)][:1]
        found = re.match(r"R(\d+)(\.reuse)?$", names[0]) if names else None
        if not found:
            return range(0)
        width = 1
        if self.is_product:
            width = int(TILE.match(self.opcode)[1]) // 2
        elif re.search(r"\.128\b", self.opcode) or re.fullmatch(r"LDSM\..*\.4", self.opcode):
            width = 4
        elif re.search(r"\.(64|WIDE)\b|^CS2R$|\.F64|^D[A-Z]+|^LDSM\..*\.2$", self.opcode):
            width = 2
        return range(int(found[1]), int(found[1]) + width)

    def operand_in_registers(self) -> range:
        """Of a product: where its A is, if not in shared memory."""
        found = re.match(r"R(\d+)", self.operands[1])
        return range(int(found[1]), int(found[1]) + 4) if found else range(0)


def functions(sass: str) -> dict[str, list[Instruction]]:
    found, current = {}, None
    for line in sass.splitlines():
        if (name := re.search(r"Function : (\S+)", line)) is not None:
            current = found.setdefault(name[1], [])
        elif (parts := INSTRUCTION.match(line)) is not None and current is not None:
            current.append(Instruction(*parts.groups()))
    return found


def meets(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def violations(code: list[Instruction]) -> list[str]:
    """Instructions that may run while a product is in flight and write what it reads or sums into."""
    places = {x.address: i for i, x in enumerate(code)}
    found = set()
    for start, product in enumerate(code):
        if not product.is_product:
            continue
        reads, sums = product.operand_in_registers(), product.destination()
        todo, seen = [(start + 1, int(product.commits))], set()  # where, and groups committed from its own on
        while todo:
            at, commits = todo.pop()
            if (at, commits) in seen or at >= len(code):
                continue
            seen.add((at, commits))
            x = code[at]
            if x.leaves is not None and commits > x.leaves:
                continue  # it is complete
            writes = x.destination()
            if meets(writes, reads) or (not x.is_product and meets(writes, sums)):
                found.add(f"{x.text} at {x.address:#x} while {product.text} at {product.address:#x} is in flight")
                continue
            commits = min(commits + x.commits, FAR)
            jump = re.search(r"0x([0-9a-f]+)$", x.text) if x.opcode.startswith("BRA") else None
            if jump and int(jump[1], 16) in places:
                todo.append((places[int(jump[1], 16)], commits))
            if x.is_guarded or x.opcode.startswith("BRA.DIV") or not re.match(r"(BRA|EXIT|RET)\b", x.opcode):
                todo.append((at + 1, commits))
    return sorted(found)


def cuobjdump() -> Path | None:
    try:
        from triton import backends
    except ImportError:
        return None
    path = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


@pytest.mark.slow
def test_registers_of_products_in_flight_are_left_alone():
    build, tool = newest_build(), cuobjdump()
    if build is None or tool is None:
        pytest.skip("no *.ptxas.log under build/ (-DLA2_PTXAS_LOG=ON), or no cuobjdump with Triton")
    logs = [log for log in current_logs(build) if "instances/sm90" in str(log)]
    assert logs
    checked = 0
    for log in logs:
        listing = subprocess.run([tool, "-sass", str(log).removesuffix(".ptxas.log")], capture_output=True, text=True)
        for name, code in functions(listing.stdout).items():
            checked += any(x.is_product for x in code)
            assert not violations(code), f"{log.name}, {name}"
    assert checked >= len(logs)


LOOP = """
        Function : loop
        /*0010*/                   LDSM.16.MT88.4 R88, [R100] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, RZ, !UPT, gsb0 ;
        /*0030*/                   {first} ;
        /*0040*/                   {second} ;
        /*0050*/              @!P0 BRA 0x30 ;
        /*0060*/                   {third} ;
        /*0070*/                   FADD R90, R24, R25 ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "first, second, third, is_wrong",
    (
        ("NOP", "FADD R1, R2, R3", "WARPGROUP.DEPBAR.LE gsb0, 0x0", False),
        ("FADD R91, R2, R3", "NOP", "WARPGROUP.DEPBAR.LE gsb0, 0x0", True),  # an operand
        ("LDS.128 R84, [R1]", "NOP", "WARPGROUP.DEPBAR.LE gsb0, 0x0", False),
        ("LDS.128 R85, [R1]", "NOP", "WARPGROUP.DEPBAR.LE gsb0, 0x0", True),
        ("SHFL.IDX PT, R88, R2, RZ, 0x1f", "NOP", "WARPGROUP.DEPBAR.LE gsb0, 0x0", True),
        ("FADD R55, R2, R3", "NOP", "WARPGROUP.DEPBAR.LE gsb0, 0x0", True),  # a sum
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R88, R2, R3", "NOP", True),  # waits for others
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R88, R2, R3", "NOP", False),
        ("NOP", "NOP", "NOP", True),  # never waited for: the addition at the end
    ),
)
def test_the_check_itself(first, second, third, is_wrong):
    code = functions(LOOP.format(first=first, second=second, third=third))["loop"]
    assert bool(violations(code)) == is_wrong


def test_the_end_of_a_loop_is_seen():
    listing = """
        Function : back
        /*0010*/                   FADD R89, R2, R3 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, RZ, !UPT, gsb0 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   EXIT ;
    """
    (found,) = violations(functions(listing)["back"])
    assert found.startswith("FADD R89, R2, R3 at 0x10 while HGMMA") and found.endswith("at 0x30 is in flight")
