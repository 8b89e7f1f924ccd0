"""Launches by srun, mpirun and by train_pl.py itself, against torchrun's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine import checkpoint as ckpt
from engine import distributed, launch
from engine.launchers import adopt_launcher, read_place
from tests.conftest import TINY
from tests.fault_support import ROOT

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
        ({**SRUN, "SLURM_PROCID": "9"}, "RANK=9, WORLD_SIZE=8"),
    ],
)
def test_variables_that_do_not_suffice(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adopt_launcher(variables)
        read_place(variables)


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm may show each task one GPU, as number 0; two ranks of torchrun never share one."""
    assert [distributed.select_gpu(3, 4), distributed.select_gpu(3, 1)] == [3, 0]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for local_rank, count in ((1, 1), (4, 4)):
        with pytest.raises(ValueError, match="start one process for each GPU"):
            distributed.select_gpu(local_rank, count)


def start(
    script: str, output: Path, data: Path, variables: dict[str, str], *flags: str, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER", "SLURM_", "TORCHELASTIC_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    environment = {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    overrides = [*TINY, f"data.path={data}", "data.num_workers=1", "train.max_steps=4", f"train.output_dir={output}"]
    command = [sys.executable, *before, str(ROOT / script), *overrides, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def srun(output: Path, data: Path, **variables: str) -> list[tuple[int, str]]:
    """Returns exit code and errors of the two tasks of a job step."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        job = {"SLURM_NTASKS": "2", "MASTER_PORT": str(free.getsockname()[1]), **variables}
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    tasks = [start("train.py", output, data, job | place) for place in places]
    return [(task.wait(), error) for task in tasks for _, error in [task.communicate(timeout=120)]]


def test_the_bits_of_torchrun(frame_folders: Path, tmp_path: Path) -> None:
    """srun's two tasks and the two processes that train_pl.py starts give the weights of torchrun's two ranks."""
    assert [code for code, _ in srun(tmp_path / "srun", frame_folders)] == [0, 0]
    twin = start("train_pl.py", tmp_path / "twin", frame_folders, {}, "--devices", "2")
    assert twin.wait(120) == 0, twin.communicate()[1][-3000:]
    launcher = ["-m", "engine.elastic", "--standalone", "--nproc_per_node=2"]
    whole = start("train.py", tmp_path / "torchrun", frame_folders, {"PYTHONPATH": str(ROOT)}, before=launcher)
    assert whole.wait(120) == 0, whole.communicate()[1][-3000:]
    folders = [tmp_path / name / "checkpoints" / "step-0000004" for name in ("torchrun", "srun", "twin")]
    expected, *found = (ckpt.load_checkpoint(folder).groups for folder in folders)
    for groups in found:
        for name, group in groups.items():
            assert group.keys() == expected[name].keys()
            assert all(torch.equal(value, expected[name][key]) for key, value in group.items()), name


def test_a_wrong_address_ends_every_task_in_a_sentence(frame_folders: Path, tmp_path: Path) -> None:
    for code, error in srun(tmp_path / "run", frame_folders, SLURM_JOB_NODELIST="no[1-2].invalid"):
        assert code == 2 and "cannot reach the others" in error.strip().splitlines()[-1], error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "case"), [(0, "missing task"), (0, "port in use"), (1, "port in use")])
def test_ranks_that_do_not_meet(rank: int, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the time that the launcher's tasks have; a foreign server at the port may never answer."""
    monkeypatch.setattr(distributed, "MEET_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if case == "missing task":
            server.close()
        job = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in job.items():
            monkeypatch.setenv(name, str(value))
        begun = time.monotonic()
        with pytest.raises(OSError, match=f"rank {rank} of 2 cannot reach the others at .*:{port}.*set another"):
            distributed.init_world("cpu")
        assert time.monotonic() - begun < 20


def test_devices_agree_with_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--devices must be at least 1"):
        launch.start_devices(0)
    launch.start_devices(1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    launch.start_devices(None)
    launch.start_devices(2)
    with pytest.raises(ValueError, match="the launcher started 2"):
        launch.start_devices(4)
