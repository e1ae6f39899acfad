"""What ranks tell each other beside states: that they run the same call, and who is missing when one does not answer.

A collective whose ranks disagree in shape hangs, or worse, does not. So before the states of a call move, every rank
sends every other one a few integers about it (`FACTS`), and a difference is an error that names the rank. This is
`8 * len(FACTS) * (W - 1)` bytes a rank beside the states, and waits for the host; a caller who passes `lengths` has
vouched for them, and nothing is sent.
"""

from __future__ import annotations

import datetime
import time
import zlib

import torch
import torch.distributed as dist
from torch import Tensor

#: Of these all ranks must have the same, but for the first.
FACTS = (
    "tokens",
    "batch rows",
    "heads",
    "D",
    "E",
    "dtype",
    "layout",
    "slope",
    "sequences in cu_seqlens",
    "checksum of cu_seqlens",
    "return_final_state",
    "requires grad",
)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SHOWN = {
    "dtype": [str(d).removeprefix("torch.") for d in _DTYPES],
    "layout": ["contiguous", "zigzag"],
    "slope": ["None", "[H]", "[num_seqs, H]"],
    "return_final_state": ["False", "True"],
    "requires grad": ["False", "True"],
}
#: How long the ranks that are left wait for each other's sign of life before they name who is missing.
GRACE = 5.0  # seconds
_TAG = 7002


def resolve(group, mesh, mesh_dim, caller: str) -> dist.ProcessGroup:
    """The process group meant by `group` or by `mesh` and `mesh_dim`; the default group if by neither."""
    if mesh is None:
        if mesh_dim is not None:
            raise ValueError(
                f"{caller}: mesh_dim is {mesh_dim!r} without a mesh, expected mesh=<a DeviceMesh> beside it"
            )
        return dist.group.WORLD if group is None else group
    if group is not None:
        raise ValueError(f"{caller}: both group and mesh are given, expected one of them")
    if mesh_dim is None and mesh.ndim != 1:
        raise ValueError(
            f"{caller}: mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}, expected mesh_dim to name one of them"
        )
    return mesh.get_group(mesh_dim)


def facts_of(q: Tensor, v: Tensor, slope, cu_seqlens, layout: str, return_final_state: bool, differentiable: bool):
    """The integers of `FACTS` for a call."""
    checksum = 0
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        checksum = zlib.crc32(str(cu_seqlens.tolist()).encode())
    return [
        q.shape[2],
        q.shape[0],
        q.shape[1],
        q.shape[3],
        v.shape[3],
        _DTYPES.index(q.dtype) if q.dtype in _DTYPES else -1,
        ("contiguous", "zigzag").index(layout),
        0 if slope is None else slope.dim(),
        -1 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        checksum,
        int(return_final_state),
        int(differentiable),
    ]


def _speaks_cpu(group: dist.ProcessGroup) -> bool:
    return "cpu" in dist.get_backend_config(group)


def _exchange(group: dist.ProcessGroup, mine: list[int], device: torch.device) -> list[list[int]]:
    """Everyone's integers. Over a backend for CPU tensors one message to each: the one that fails names its rank."""
    world, rank = group.size(), group.rank()
    if not _speaks_cpu(group):
        received = all_gather(torch.tensor([mine], device=device), world, group.group_name)
        return wait(received, group.group_name).tolist()
    sent = torch.tensor(mine)
    rows = [torch.empty_like(sent) for _ in range(world)]
    rows[rank] = sent
    missing: dict[int, str] = {}
    pending = []
    others = [(rank + i) % world for i in range(1, world)]
    for call, peers in ((dist.irecv, others), (dist.isend, others)):
        for peer in peers:
            try:
                extra = {"group_src" if call is dist.irecv else "group_dst": peer}
                tensor = rows[peer] if call is dist.irecv else sent
                pending.append((peer, call(tensor, group=group, tag=_TAG, **extra)))
            except RuntimeError as error:
                missing.setdefault(peer, str(error))
    for peer, work in pending:
        try:
            work.wait()
        except RuntimeError as error:
            missing.setdefault(peer, str(error))
    if missing:
        raise _missing_error(group, missing, "did not take part in this call")
    return [row.tolist() for row in rows]


def _missing_error(group: dist.ProcessGroup, missing: dict[int, str], what: str) -> RuntimeError:
    names = ", ".join(f"rank {r}" + _global_name(group, r) for r in sorted(missing))
    reason = next(iter(missing.values())).splitlines()[0]
    return RuntimeError(f"lightning_attention_cp: {names} {what}; rank {group.rank()} saw: {reason}")


def _global_name(group: dist.ProcessGroup, rank: int) -> str:
    whole = dist.get_global_rank(group, rank)
    return "" if whole == rank else f" of the group (global rank {whole})"


def agree(group: dist.ProcessGroup, mine: list[int], device: torch.device) -> list[int]:
    """Token counts of all ranks, or an error that names the rank whose call differs from that of rank 0."""
    rows = _exchange(group, mine, device)
    for rank, row in enumerate(rows):
        for name, first, got in list(zip(FACTS, rows[0], row, strict=True))[1:]:
            if got != first:
                show = _SHOWN.get(name)
                got, first = (show[x] if show and 0 <= x < len(show) else x for x in (got, first))
                raise RuntimeError(
                    f"lightning_attention_cp: {name} is {got} on rank {rank}{_global_name(group, rank)}, expected "
                    f"{first} as on rank 0{_global_name(group, 0)}"
                )
    return [row[0] for row in rows]


@torch.library.custom_op("la2_distributed::agree", mutates_args=())
def agree_op(like: Tensor, mine: list[int], group_name: str) -> Tensor:
    """:func:`agree` within a compiled graph: int64 `[W]` on the CPU."""
    group = dist.distributed_c10d._resolve_process_group(group_name)
    return torch.tensor(agree(group, mine, like.device))


@agree_op.register_fake
def _(like, mine, group_name):
    return torch.empty(dist.distributed_c10d._resolve_process_group(group_name).size(), dtype=torch.int64)


def all_gather(x: Tensor, world: int, group_name: str) -> Tensor:
    """`x` of all ranks one behind the other along dimension 0: asynchronous, until the result is used."""
    if world == 1:
        return x
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), world, group_name)


def wait(x: Tensor, group_name: str) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(x)
    try:
        return torch.ops._c10d_functional.wait_tensor(x)
    except RuntimeError as error:
        raise _who_is_missing(group_name, error) from error


def all_reduce(x: Tensor, world: int, group_name: str) -> Tensor:
    if world == 1:
        return x
    return wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name), group_name)


def _who_is_missing(group_name: str, error: RuntimeError) -> RuntimeError:
    """After a failed collective: which rank is gone, else which one gives no sign of life within `GRACE`.

    A broken connection alone proves nothing, since gloo, once it has failed, also closes those to ranks that are well;
    and a rank may give no sign because it still waits in the collective. So both are asked, the store of the process
    group being where ranks leave their sign.
    """
    group = dist.distributed_c10d._resolve_process_group(group_name)
    failed = f"lightning_attention_cp: the exchange of states failed on rank {group.rank()}: {error}"
    if not _speaks_cpu(group):
        return RuntimeError(failed)
    key = f"la2_distributed/alive/{group_name}/"
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(key + str(group.rank()), "1")
        broken, silent = _ping(group)
        for suspects in (broken, silent):
            end = time.monotonic() + GRACE
            while suspects and time.monotonic() < end:
                suspects = {r: text for r, text in suspects.items() if not store.check([key + str(r)])}
                time.sleep(0.05)
            if suspects:
                return _missing_error(group, suspects, "dropped out of the exchange of states")
    except RuntimeError as gone:  # dist.DistError is one
        return RuntimeError(f"{failed} (and the store of the group, which rank 0 or its launcher serves, says: {gone})")
    return RuntimeError(failed)


def _ping(group: dist.ProcessGroup) -> tuple[dict[int, str], dict[int, str]]:
    """Ranks to which the connection is broken, and those that say nothing; each with what was seen."""
    broken: dict[int, str] = {}
    silent: dict[int, str] = {}
    pending, mark = [], torch.zeros(1)
    for peer in range(group.size()):
        if peer == group.rank():
            continue
        try:
            dist.isend(mark, group=group, group_dst=peer, tag=_TAG + 1)
            pending.append((peer, dist.irecv(torch.empty(1), group=group, group_src=peer, tag=_TAG + 1)))
        except RuntimeError as failure:
            broken[peer] = str(failure)
    end = time.monotonic() + GRACE
    for peer, work in pending:
        try:
            work.wait(datetime.timedelta(seconds=max(0.1, end - time.monotonic())))
        except RuntimeError as failure:
            text = str(failure)
            (silent if "imed out" in text else broken)[peer] = text
    return broken, silent
