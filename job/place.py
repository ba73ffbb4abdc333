"""Which of a run's processes this is, by the variables of torchrun, accelerate, srun or a TrainJob."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from job.errors import SpecError

VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
}
"""Variables by which libraries would take a rank for more than a process with one device, and shard by themselves."""


@dataclass(frozen=True)
class Place:
    """`rank` among `world` processes; `local_rank` among those of this node."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1


def place(environment: Mapping[str, str]) -> Place:
    """Who this process is, by the variables of its launcher. Raises SpecError for variables that say nothing whole."""
    names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world": "WORLD_SIZE"}
    if not environment.get("RANK"):
        if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            names = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "world": "SLURM_STEP_NUM_TASKS"}
        elif environment.get("PET_NPROC_PER_NODE", "1") != "1":
            raise SpecError(
                f"PET_NPROC_PER_NODE is {environment['PET_NPROC_PER_NODE']}, and nobody made these processes; start the job "
                "as python -m job.torchrun -m job run"
            )
        elif environment.get("PET_NNODES"):
            names = {"rank": "PET_NODE_RANK", "world": "PET_NNODES"}
    try:
        found = Place(**{field: int(environment[name]) for field, name in names.items() if environment.get(name)})
    except ValueError:
        found = Place(rank=-1)
    if not 0 <= found.local_rank <= found.rank < found.world:
        said = ", ".join(f"{name}={environment.get(name, '')}" for name in names.values())
        raise SpecError(f"{said}: no process has this place; start the job with torchrun, accelerate or srun")
    return found


def one_gpu(environment: MutableMapping[str, str], local_rank: int) -> None:
    """Let this process see one GPU, which is then its first: libraries need know nothing of the others."""
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else []
    if len(devices) == 1 or seen == "":  # the launcher chose it, or none
        return
    if devices and local_rank >= len(devices):
        raise SpecError(
            f"LOCAL_RANK is {local_rank}, and CUDA_VISIBLE_DEVICES names {len(devices)} GPUs: start one process for each"
        )
    environment["CUDA_VISIBLE_DEVICES"] = devices[local_rank] if devices else str(local_rank)


def hide(environment: MutableMapping[str, str]) -> None:
    for name in VARIABLES & set(environment):
        del environment[name]
