"""Start and end of a run with several processes, and its mesh of data x expert ranks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels.distributed.running.failure import (
    CollectiveError,
    collective,
    start_heartbeat,
    stop_heartbeat,
)

MESH_DIMS = ("dp", "ep")
LINGER_SECONDS = 3.0
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_parallel(
    data: int,
    expert: int,
    *,
    device: torch.device | str = "cpu",
    timeout: float = 600.0,
    heartbeat: float = 0.5,
    fingerprint: str = "",
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> DeviceMesh:
    """Starts the process groups of a run; every rank must call this function once, first.

    Ranks register in the store before they connect. The others raise an error that names a rank
    that is missing after `timeout` or was started with other sizes or another `fingerprint`.

    Ranks with consecutive numbers share an `ep` group: on hosts with `expert` devices, tokens stay
    within a host and only gradients are sent between hosts.

    Args:
        data: size of the dimension `dp`.
        expert: size of the dimension `ep`; `data * expert` must be the number of processes.
        device: device type of the model; `"cuda"` uses NCCL (and gloo for tensors on the CPU),
            `"cpu"` gloo. `"cuda"` makes the GPU of torchrun's local rank the current one, and
            `"cuda:1"` that one.
        timeout: seconds to wait for all ranks to join a collective.
        heartbeat: seconds between the heartbeats that a rank sends through the store. When a
            collective fails, ranks that miss six of them are named as the cause.
        fingerprint: a value that must be equal on all ranks, such as a digest of the settings.
        init_method: as in `torch.distributed.init_process_group`; by default the environment of
            `torchrun`.
        rank: rank of this process; required with init_method.
        world_size: number of processes; required with init_method.

    Returns:
        A mesh with dimensions `("dp", "ep")`.

    Raises:
        ValueError: If a size is below 1, their product is not the number of processes, or the
            environment of torchrun is missing.
        RuntimeError: If a rank exceeds the timeout or was started with other arguments, or process
            groups already exist.
    """
    for name, size in (("data", data), ("expert", expert)):
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")
    for name, seconds in (("timeout", timeout), ("heartbeat", heartbeat)):
        if not seconds > 0:
            raise ValueError(f"{name} ({seconds}) must be above 0")
    if dist.is_initialized():
        raise RuntimeError("process groups exist already; make a mesh with init_device_mesh")
    rank, world_size = _own_place(init_method, rank, world_size)
    if data * expert != world_size:
        raise ValueError(
            f"data ({data}) times expert ({expert}) must be the number of processes ({world_size})"
        )
    device, limit = torch.device(device), timedelta(seconds=timeout)
    select_gpu(device)
    where = f"rank {rank} of {world_size}: start"
    with _told(f"{where}: the store of the run, which rank 0 keeps, cannot be reached"):
        store = _store(init_method, rank, world_size, limit)
    sizes = f"data {data}, expert {expert}, processes {world_size}"
    _call_roll(store, rank, world_size, {"sizes": sizes, "settings": fingerprint}, timeout)
    start_heartbeat(store, rank, world_size, heartbeat)
    try:
        with collective("start, connecting"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("groups", store),
                rank=rank,
                world_size=world_size,
                timeout=limit,
            )
            ranks = torch.arange(world_size, device="cpu").view(data, expert)
            groups = [_own_group(lines, rank, limit) for lines in (ranks.t(), ranks)]
    except CollectiveError:
        stop_heartbeat()
        raise
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=MESH_DIMS)


def select_gpu(device: torch.device) -> None:
    """Makes a GPU the current one: that of an index, or else of torchrun's local rank.

    Without either, the current one is kept.
    """
    if device.type != "cuda":
        return
    index = os.environ.get("LOCAL_RANK") if device.index is None else device.index
    if index is not None:
        torch.cuda.set_device(int(index))


def finish_parallel() -> None:
    """Destroys the process groups after all ranks have called this function.

    A rank that has failed must not call it but exit, so that the others notice.
    """
    if dist.is_initialized():
        with collective("end of the run"):
            dist.barrier()
        stop_heartbeat()
        dist.destroy_process_group()


def _own_place(
    init_method: str | None, rank: int | None, world_size: int | None
) -> tuple[int, int]:
    if init_method is not None:
        if rank is None or world_size is None:
            raise ValueError(f"init_method ({init_method!r}) needs rank and world_size")
        return rank, world_size
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ValueError(
            f"environment variables {missing} are not set: start the processes with torchrun"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise RuntimeError(f"{what}: {' '.join(str(error).split())}") from error


def _store(init_method: str | None, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store of all ranks.

    Unlike `torch.distributed.rendezvous` this does not wait for other ranks: the registration does,
    and names the ranks that are missing.
    """
    attempt, kept_by_agent = "0", False
    if init_method is None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun hosts the store itself and counts its restarts.
        kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    elif init_method.startswith("tcp://"):
        host, _, port = init_method.removeprefix("tcp://").rpartition(":")
    else:
        arguments = {"rank": rank, "world_size": world_size, "timeout": timeout}
        return next(dist.rendezvous(init_method, **arguments))[0]
    store = dist.TCPStore(
        host,
        int(port),
        is_master=rank == 0 and not kept_by_agent,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"unimoe/attempt{attempt}", store)


def _call_roll(
    store: dist.Store, rank: int, world_size: int, facts: dict[str, str], timeout: float
) -> None:
    keys = [f"unimoe/roll/{other}" for other in range(world_size)]
    where, deadline = f"rank {rank} of {world_size}: start", time.monotonic() + timeout
    store.set(keys[rank], json.dumps(facts))
    for other, key in enumerate(keys):
        try:
            store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            found = json.loads(store.get(key))
        except (RuntimeError, dist.DistError) as error:
            missing = [other for other, key in enumerate(keys) if not _is_there(store, key)]
            _linger(store, rank, world_size)
            raise RuntimeError(
                f"{where}: ranks {missing} have not come within {timeout:g} s"
            ) from error
        for what, own in facts.items():
            if found[what] != own:
                _linger(store, rank, world_size)
                raise RuntimeError(
                    f"{where}: rank {other} has other {what} ({found[what]}) than this rank ({own})"
                )


def _linger(store: dist.Store, rank: int, world_size: int) -> None:
    """Delays the exit of rank 0, which may host the store, so that others can read the error."""
    read = [f"unimoe/roll/read/{other}" for other in range(world_size)]
    try:
        store.set(read[rank], "")
        if rank == 0:
            store.wait(read, timedelta(seconds=LINGER_SECONDS))
    except (RuntimeError, dist.DistError):
        return


def _is_there(store: dist.Store, key: str) -> bool:
    try:
        return store.check([key])
    except (RuntimeError, dist.DistError):
        return False


def _own_group(lines: torch.Tensor, rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Creates a group of each row of ranks, in the same order on all ranks; returns this rank's."""
    own = None
    for line in lines.tolist():
        group = dist.new_group(line, timeout=timeout)
        if rank in line:
            own = group
    return own
