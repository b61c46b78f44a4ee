"""Describes the machine and the versions of a measurement, and measures how busy the machine is."""

import hashlib
import os
import platform
import re
import threading
import time
from pathlib import Path

import torch

from ..build_info import backend_info


def search(path: str, pattern: str) -> str | None:
    """The first group of a pattern in a file, or None."""
    found = re.search(pattern, Path(path).read_text()) if Path(path).exists() else None
    return found and found.group(1)


def describe_environment() -> dict[str, object]:
    """The machine and the versions. "load" is the load average before the measurement, which can explain noise."""
    info = backend_info()
    return {
        "fused_dropout": info.version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": search("/proc/cpuinfo", r"model name\s*: (.*)") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": search("/proc/driver/nvidia/version", r"Kernel Module\D.*?\s(\d+\.[\d.]+)\s"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "backend_info": info._asdict(),
    }


def cpu_share(threads: int) -> float:
    """The CPU time that this many busy threads get, as a share of what they need: 1 on a free machine.

    Takes about 50 ms. The threads compute hashes, because hashlib releases the GIL.
    """
    block, asked = bytes(2**24), []

    def work() -> None:
        start = time.perf_counter()
        for _ in range(2):
            hashlib.sha256(block)
        asked.append(time.perf_counter() - start)

    time.sleep(0.02)  # OpenMP's threads spin for about 10 ms after an operation, and would look like another program
    workers = [threading.Thread(target=work) for _ in range(threads)]
    start = time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return min(1.0, (time.process_time() - start) / sum(asked))
