"""Ranks from the environment: torchrun's variables, or srun's and mpirun's translated to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from common.checks import require

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# launchers that start one process per task -> their variables for NAMES
FOREIGN = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
ADOPTED = "LATTE_LAUNCHER"  # environment variable: the launcher whose variables were translated
LOCALHOST = "127.0.0.1"


def adopt_launcher(environment: MutableMapping[str, str]) -> None:
    """Sets torchrun's variables from srun's or mpirun's, if they are unset and there are several tasks.

    If unset, MASTER_ADDR becomes the job's first node and MASTER_PORT is derived from the job id.

    Raises: ValueError if an address is needed and none can be found.
    """
    if any(name in environment for name in NAMES):
        return
    for launcher, variables in FOREIGN.items():
        if variables[0] not in environment or environment.get(variables[1], "1") == "1":
            continue
        missing = [name for name in variables if name not in environment]
        require(not missing, f"{launcher} started several tasks, but {', '.join(missing)} is not set.")
        environment.update({name: environment[variable] for name, variable in zip(NAMES, variables, strict=True)})
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _find_address(launcher, environment)
        environment[ADOPTED] = launcher
        job = environment.get("SLURM_JOB_ID", "")
        environment.setdefault("MASTER_PORT", str(10000 + int(job) % 20000 if job.isdigit() else 29500))
        return


def _find_address(launcher: str, environment: Mapping[str, str]) -> str:
    """Returns the first node of a multi-node Slurm job, else this machine."""
    if launcher == "srun":
        nodes = next((environment[name] for name in NODES if environment.get(name)), "")
        # e.g. node[03-05,09],other: take the first of each bracket, then the first name
        first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).partition(",")[0]
        return LOCALHOST if environment.get("SLURM_NNODES") == "1" else first or LOCALHOST
    size = environment["WORLD_SIZE"]
    require(
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", size) == size,
        "mpirun started tasks on several machines: set MASTER_ADDR to the machine of rank 0 (mpirun -x MASTER_ADDR).",
    )
    return LOCALHOST


def read_place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Returns the launcher's (RANK, WORLD_SIZE, LOCAL_RANK), by default (0, 1, 0). Raises: ValueError."""
    texts = {name: environment.get(name, alone) for name, alone in zip(NAMES, "010", strict=True)}
    wrong = [f"{name}={text!r}" for name, text in texts.items() if not (text.isascii() and text.isdigit())]
    require(
        not wrong,
        f"{', '.join(wrong)}: must be a number; the launcher (torchrun, srun) sets it, so unset it otherwise.",
    )
    rank, size, local_rank = (int(text) for text in texts.values())
    require(
        rank < size and local_rank < size,
        f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank} do not belong together: ranks go from 0 to "
        "WORLD_SIZE - 1. The launcher (torchrun, srun) sets them; unset them to train with one process.",
    )
    return rank, size, local_rank
