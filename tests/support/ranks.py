"""Processes that make up a group on this machine, started once and given one function after the other."""

import datetime
import multiprocessing
import os
import tempfile
import traceback

import torch.distributed as dist

START = datetime.timedelta(seconds=120)


class Ranks:
    """`world` processes; `run(function, *args)` calls `function(rank, *args)` on each and returns what they return.

    `function` must be importable by name (it is pickled). `timeout` is that of the collectives. With backend "nccl" the
    current device of rank i is GPU i."""

    def __init__(self, world, timeout=60, backend="gloo"):
        # A server that has imported everything already: each process is then a fork of it, and starts at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.ranks_preload"])
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._pipes, self._processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world, store, timeout, backend), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def start(self, function, *args):
        for pipe in self._pipes:
            pipe.send((function, args))

    def results(self, timeout=180, ranks=None):
        """(value, traceback or None) of each rank; a rank that is gone or silent gives its state as the traceback."""
        found = []
        for rank in range(self.world) if ranks is None else ranks:
            try:
                pipe = self._pipes[rank]
                found.append(pipe.recv() if pipe.poll(timeout) else (None, f"rank {rank} gave no answer"))
            except (EOFError, ConnectionError):
                found.append((None, f"rank {rank} is gone"))
        return found

    def run(self, function, *args, timeout=180):
        self.start(function, *args)
        found = self.results(timeout)
        failures = [f"rank {rank}:\n{text}" for rank, (_, text) in enumerate(found) if text is not None]
        assert not failures, "\n".join(failures)
        return [value for value, _ in found]

    def close(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(pipe, rank, world, store, timeout, backend):
    import torch

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    dist.barrier()  # all are connected before one may be told to die
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            pipe.send((function(rank, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    os._exit(0)
