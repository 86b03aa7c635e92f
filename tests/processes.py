"""Two processes that work together, as torchrun starts them, over gloo on one machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _joined(rank: int, work: Callable[..., None], port: int, given: tuple) -> None:
    """One of them: do the work, with the environment that torchrun gives."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(v) for name, v in own.items()}}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        work(rank, *given)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_two_processes(work: Callable[..., None], *given: Any) -> None:
    """Call work(rank, *given) in each of two processes; what it raises is raised here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # finds a free port
    port = store.port
    del store
    mp.start_processes(_joined, (work, port, given), nprocs=2, start_method="spawn")
