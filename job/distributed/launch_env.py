"""Reads this process's rank from the variables of torchrun, accelerate, srun or a TrainJob."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from job.errors import SpecError

VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
}
"""Variables that make libraries take a rank for more than a process with one device, and shard by themselves."""


@dataclass(frozen=True)
class LaunchEnv:
    """`rank` among `world` processes; `local_rank` among those of this node."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1


def read_launch_env(environment: Mapping[str, str]) -> LaunchEnv:
    """Read this process's rank from the variables of its launcher. Raises SpecError for incomplete or contradictory variables."""
    names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world": "WORLD_SIZE"}
    if not environment.get("RANK"):
        if environment.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1"):
            names = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "world": "SLURM_STEP_NUM_TASKS"}
        elif environment.get("PET_NPROC_PER_NODE", "1") != "1":
            raise SpecError(
                f"PET_NPROC_PER_NODE is {environment['PET_NPROC_PER_NODE']}, and no launcher started these processes; start "
                "the job as python -m job.torchrun -m job run"
            )
        elif environment.get("PET_NNODES"):
            names = {"rank": "PET_NODE_RANK", "world": "PET_NNODES"}
    try:
        found = LaunchEnv(**{field: int(environment[name]) for field, name in names.items() if environment.get(name)})
    except ValueError:
        found = LaunchEnv(rank=-1)
    if not 0 <= found.local_rank <= found.rank < found.world:
        said = ", ".join(f"{name}={environment.get(name, '')}" for name in names.values())
        raise SpecError(f"{said}: no rank has these values; start the job with torchrun, accelerate or srun")
    return found


def one_gpu(environment: MutableMapping[str, str], local_rank: int) -> None:
    """Let this process see one GPU, which is then its first, so that libraries need not know of the others."""
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else []
    if len(devices) == 1 or seen == "":  # the launcher chose it, or none
        return
    if devices and local_rank >= len(devices):
        raise SpecError(
            f"LOCAL_RANK is {local_rank}, and CUDA_VISIBLE_DEVICES names {len(devices)} GPUs; start one process per GPU"
        )
    environment["CUDA_VISIBLE_DEVICES"] = devices[local_rank] if devices else str(local_rank)


def hide_launch_env(environment: MutableMapping[str, str]) -> None:
    for name in VARIABLES & set(environment):
        del environment[name]
