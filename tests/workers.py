"""Processes of one gloo group that run functions of a test file. They start once for all of its tests."""

import datetime
import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback

import pytest

WORLD = 2
TIMEOUT = 60  # seconds for a function, and for the collectives inside


def _serve(rank, world, store, connection, hidden, module, timeout):
    for name in hidden:
        sys.modules[name] = None
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve to this host
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    functions = importlib.import_module(module)
    timeout = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    while True:
        name, args = connection.recv()
        try:
            result = True, getattr(functions, name)(rank, *args)
        except BaseException:
            result = False, traceback.format_exc()
        # Sends tensors by value: torch would send them in shared memory, which ends with this process.
        connection.send_bytes(pickle.dumps(result))


def workers_of(module, **options):
    """A fixture for a test file: its ``Workers``."""

    @pytest.fixture(scope="module")
    def workers():
        workers = Workers(module, **options)
        yield workers
        workers.stop()

    return workers


class Workers:
    """``workers(function, *args)`` runs ``function(rank, *args)`` in each process and returns the results by rank."""

    def __init__(self, module, world=WORLD, timeout=TIMEOUT):
        self.module, self.world, self.timeout = module, world, timeout
        self.processes = []

    def _start(self):
        self.folder = tempfile.TemporaryDirectory()
        hidden = [name for name, loaded in sys.modules.items() if name.startswith("fused_dropout.") and loaded is None]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (
                rank,
                self.world,
                os.path.join(self.folder.name, "store"),
                theirs,
                hidden,
                self.module,
                self.timeout,
            )
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.processes.append((process, ours))

    def __call__(self, function, *args):
        if not self.processes:
            self._start()
        try:
            for _, connection in self.processes:
                connection.send((function.__name__, args))
            results = []
            for rank, (_, connection) in enumerate(self.processes):
                assert connection.poll(self.timeout), f"rank {rank} has not answered for {self.timeout} s"
                done, result = pickle.loads(connection.recv_bytes())
                assert done, f"rank {rank}:\n{result}"
                results.append(result)
        except BaseException:
            self.stop()  # one process may wait for another; the next call starts new ones
            raise
        return results

    def stop(self):
        for process, _ in self.processes:
            process.kill()
        for process, connection in self.processes:
            process.join(TIMEOUT)
            connection.close()
        if self.processes:
            self.folder.cleanup()
        self.processes = []
