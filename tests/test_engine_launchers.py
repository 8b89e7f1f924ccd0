"""Launches by srun, mpirun and by train_pl.py itself, against torchrun's."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine import checkpoint as ckpt
from engine import distributed, launch
from engine.launchers import adopt_launcher, read_place
from tests.conftest import TINY, refuses
from tests.fault_support import ROOT, same_tensors

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "place", "where"),
    [
        ({}, (0, 1, 0), None),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1, 0), None),
        (SRUN, (3, 8, 1), "127.0.0.1:29500"),
        ({**SRUN, "SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "cn[07-09,12],gpu3"}, (3, 8, 1), "cn07:10007"),
        ({**SRUN, "SLURM_JOB_NODELIST": "rack[1-2]n[3,5]x"}, (3, 8, 1), "rack1n3x:29500"),
        ({**SRUN, "SLURM_STEP_NODELIST": "b2", "SLURM_JOB_NODELIST": "a1,b2"}, (3, 8, 1), "b2:29500"),
        ({**SRUN, "SLURM_JOB_NODELIST": "a1", "SLURM_NNODES": "1"}, (3, 8, 1), "127.0.0.1:29500"),
        ({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5"}, (3, 8, 1), "head:5"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, (3, 8, 1), "127.0.0.1:29500"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "head"}, (3, 8, 1), "head:29500"),
        ({**SRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1), None),  # torchrun within a task
    ],
)
def test_places_and_addresses(variables: dict[str, str], place: tuple[int, int, int], where: str | None) -> None:
    environment = dict(variables)
    adopt_launcher(environment)
    assert read_place(environment) == place
    assert where is None or f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}" == where


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_LOCALID is not set"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "set MASTER_ADDR"),
        ({**SRUN, "SLURM_PROCID": "9"}, "RANK=9, WORLD_SIZE=8, LOCAL_RANK=1 do not belong together"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two': must be a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_H8_variables_that_do_not_suffice(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adopt_launcher(variables)
        read_place(variables)


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm may show each task one GPU, as number 0; two ranks of torchrun never share one."""
    assert [distributed.select_gpu(3, 4), distributed.select_gpu(3, 1)] == [3, 0]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for local_rank, count in ((1, 1), (4, 4)):
        refuses("start one process for each GPU", distributed.select_gpu, local_rank, count)


def start(
    script: str, output: Path, data: Path, variables: dict[str, str], *flags: str, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER", "SLURM_", "TORCHELASTIC_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    environment = {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    overrides = [*TINY, f"data.path={data}", "data.num_workers=1", "train.max_steps=4", f"train.output_dir={output}"]
    command = [sys.executable, *before, str(ROOT / script), *overrides, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(*tasks: subprocess.Popen[str]) -> None:
    for task in tasks:
        assert task.wait(120) == 0, task.communicate()[1][-3000:]


def test_the_bits_of_torchrun(frame_folders: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        job = {"SLURM_NTASKS": "2", "MASTER_PORT": str(free.getsockname()[1])}
    places = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    wait_for(*(start("train.py", tmp_path / "srun", frame_folders, place) for place in places))
    wait_for(start("train_pl.py", tmp_path / "twin", frame_folders, {}, "--devices", "2"))
    launcher = ["-m", "engine.elastic", "--standalone", "--nproc_per_node=2"]
    wait_for(start("train.py", tmp_path / "torchrun", frame_folders, {"PYTHONPATH": str(ROOT)}, before=launcher))
    folders = [tmp_path / name / "checkpoints" / "step-0000004" for name in ("torchrun", "srun", "twin")]
    expected, *found = (ckpt.load_checkpoint(folder).groups for folder in folders)
    for groups in found:
        assert [name for name, group in groups.items() if not same_tensors(group, expected[name])] == []


@pytest.mark.parametrize(
    ("rank", "case"), [(0, "missing task"), (0, "port in use"), (1, "port in use"), (1, "wrong address")]
)
def test_H8_ranks_that_do_not_meet(rank: int, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the time that the launcher's tasks have; a foreign server at the port may never answer."""
    monkeypatch.setattr(distributed, "MEET_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if case == "missing task":
            server.close()
        host = "no1.invalid" if case == "wrong address" else "127.0.0.1"
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": host, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(OSError, match=f"rank {rank} of 2 cannot reach the others at .*{host}:{port}.*set another"):
            distributed.init_world("cpu")


def test_devices_agree_with_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses("--devices must be at least 1", launch.start_devices, 0)
    launch.start_devices(1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    launch.start_devices(None)
    launch.start_devices(2)
    refuses("the launcher started 2", launch.start_devices, 4)
