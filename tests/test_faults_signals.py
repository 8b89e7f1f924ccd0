"""Faults H1, H4, H6: stop signals as users and schedulers send them, to runs with loader workers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import checkpoint as ckpt
from engine import elastic
from engine.distributed import launch_variables
from tests.conftest import TINY
from tests.fault_support import ROOT, TAG, all_gone, cleaned_up, family, rows, wait_for_step, with_tag

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
# in place of Slurm's commands, which are not here: srun starts one task on this machine
STAND_INS = {"srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n', "scontrol": "exit 0\n"}
STEPS = 300  # of the undisturbed run, to which an interrupted one is compared

# command before the script's own arguments, and its number of ranks
LAUNCHERS: dict[str, tuple[list[str], int]] = {
    "torchrun": ([*TORCHRUN, HANDLED, "train.py", "--config"], 2),
    "launch.sh": (["bash", "train_scripts/launch.sh", "train.py"], 2),
    "train_pl": ([*TORCHRUN, HANDLED, "train_pl.py", "--config"], 2),
    "slurm": (["bash", "slurm_scripts/run.sh", "train.py"], 2),
    "python": ([sys.executable, "train.py", "--config"], 1),
}


def start(command: list[str], overrides: list[str], log: Path) -> subprocess.Popen:
    """Starts `command` on a config file and `overrides` in a process group of its own, on the CPU."""
    config = log.with_suffix(".yaml")
    config.write_text("train: {log_every: 1}\n")
    (tools := log.parent / "bin").mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}")
        (tools / name).chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
    environment = {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GPUS": "2", "MAX_RESTARTS": "0"}
    environment |= {"PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    with log.open("w") as stream:
        return subprocess.Popen(
            [*command, str(config), *overrides],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def send(process: subprocess.Popen, number: signal.Signals, *, to_group: bool) -> None:
    """Sends the signal to the launcher alone, or to its process group as a terminal's Ctrl-C does."""
    os.killpg(process.pid, number) if to_group else process.send_signal(number)


def newest(run: Path) -> ckpt.Checkpoint:
    found, complaints = ckpt.newest_verified(run / "checkpoints")
    assert found is not None and not complaints
    return ckpt.load_checkpoint(found)


@pytest.fixture(scope="session")
def undisturbed(frame_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Returns the folder of a run of STEPS steps on that number of ranks, made once."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"undisturbed{ranks}")
            common = [*TINY, *data(frame_folders), f"train.output_dir={folder / 'run'}", f"train.max_steps={STEPS}"]
            command = LAUNCHERS["torchrun" if ranks == 2 else "python"][0]
            process = start(command, common, folder / "log")
            with cleaned_up(process):
                assert process.wait(300) == 0, (folder / "log").read_text()[-3000:]
            made[ranks] = folder / "run"
        return made[ranks]

    return run


def data(frame_folders: Path) -> list[str]:
    return [f"data.path={frame_folders}", "data.num_workers=4", "train.checkpoint_every=1000", "train.log_every=1"]


def differences(one: ckpt.Checkpoint, other: ckpt.Checkpoint) -> list[str]:
    """Returns the names of the tensors in which two checkpoints differ."""
    pairs = [(getattr(one, kind), getattr(other, kind)) for kind in ("model", "ema", "optim", "rng")]
    return [
        name
        for left, right in pairs
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    ]


def stop_and_continue(
    launcher: str, number: signal.Signals, frame_folders: Path, work: Path, undisturbed: Callable[[int], Path]
) -> None:
    """Stops a run by a signal at a random step, continues it, and compares it with one that nothing disturbed."""
    command, ranks = LAUNCHERS[launcher]
    reference, run = undisturbed(ranks), work / "run"
    common = [*TINY, *data(frame_folders), f"train.output_dir={run}"]
    first = start(command, [*common, "train.max_steps=2000"], work / "first.log")
    with cleaned_up(first):
        wait_for_step(first, run, random.SystemRandom().randint(3, 60), work / "first.log")
        members = family(first)
        send(first, number, to_group=ranks == 1)
        code = first.wait(60)
        output = (work / "first.log").read_text()
        assert all_gone(members, 10), output[-3000:]
    marker = run / "PREEMPTED"
    assert marker.exists(), f"exit code {code}: {output[-3000:]}"
    stopped = json.loads(marker.read_text())["step"]
    assert newest(run).step == stopped < STEPS, output[-3000:]
    if launcher in ("launch.sh", "python"):  # torchrun itself ends in a traceback and with 1
        assert code == (130 if number == signal.SIGINT else 75)
        assert f"stopped by {number.name}" in output.strip().splitlines()[-1], output[-3000:]

    second = start(command, [*common, f"train.max_steps={STEPS}"], work / "second.log")
    with cleaned_up(second):
        assert second.wait(300) == 0, (work / "second.log").read_text()[-3000:]
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(reference)]
    assert not differences(newest(run), newest(reference))


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_H1_sigterm_saves_with_loader_workers(
    launcher: str, frame_folders: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    stop_and_continue(launcher, signal.SIGTERM, frame_folders, tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_H1_every_signal_under_every_launcher(
    launcher: str, number: signal.Signals, frame_folders: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    if (launcher, number) == ("slurm", signal.SIGINT):
        pytest.skip("Slurm sends SIGTERM and the signal of --signal, here SIGUSR1")
    stop_and_continue(launcher, number, frame_folders, tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_H4_no_orphans_of_a_rank_killed_during_its_start(
    attempt: int, frame_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments are spread over the imports of the rank, of its fork server and of its workers."""
    tag = str(tmp_path)
    monkeypatch.setenv(TAG, tag)
    process = start(
        LAUNCHERS["python"][0],
        [*TINY, *data(frame_folders), f"train.output_dir={tmp_path / 'run'}", "train.max_steps=100000"],
        tmp_path / "log",
    )
    with cleaned_up(process):
        deadline = time.monotonic() + 60
        while not [each for each in with_tag(tag) if "forkserver" in " ".join(each.cmdline())]:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        time.sleep(0.5 * attempt)
        process.kill()
        process.wait(10)
        deadline = time.monotonic() + 15
        while left := with_tag(tag):
            assert time.monotonic() < deadline, [each.cmdline() for each in left]
            time.sleep(0.1)


# ---- launches --------------------------------------------------------------------------------------

RANK_OF = """
import os, sys
sys.path[0] = os.getcwd()
import train
from engine import cli
if os.environ["RANK"] == "1":
    sys.argv += os.environ["ONLY_RANK_1"].split()
cli.run(train.main)
"""


@pytest.mark.parametrize(
    "only",
    [
        pytest.param("optim.learning_rate=2e-3 train.max_steps=7", id="two keys"),
        pytest.param("model.depth=4", id="network", marks=pytest.mark.slow),
        pytest.param("--override data_digest", id="flag", marks=pytest.mark.slow),
    ],
)
def test_H2_ranks_with_different_configurations(
    only: str, frame_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every differing key is named, nothing is written, and every rank ends."""
    (tmp_path / "script.py").write_text(RANK_OF)
    monkeypatch.setenv("ONLY_RANK_1", only)
    overrides = [*TINY, *data(frame_folders), f"train.output_dir={tmp_path / 'run'}", "train.max_steps=4"]
    process = start([*TORCHRUN, str(tmp_path / "script.py"), "--config"], overrides, tmp_path / "log")
    with cleaned_up(process):
        started = time.monotonic()
        assert process.wait(60) == 1
        assert time.monotonic() - started < 60
    output = (tmp_path / "log").read_text()
    assert "rank 1 was started with another configuration than rank 0" in output
    for key in [word.partition("=")[0].strip("-") for word in only.split() if "=" in word or word.startswith("--")]:
        assert f"{key} " in output.partition("another configuration")[2], output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5, WORLD_SIZE=2, LOCAL_RANK=0 do not belong together"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two': must be a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_H8_launch_variables_that_do_not_belong_together(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        launch_variables(variables)


def test_H8_master_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        process = start(LAUNCHERS["python"][0], [*TINY, f"data.path={tmp_path}"], tmp_path / "log")
        with cleaned_up(process):
            assert process.wait(60) == 2
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error")]
    assert f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}" in line and "set another MASTER_PORT" in line
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_H8_the_port_of_a_launch_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        flags = ["--nnodes=1", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        flags += ["--rdzv-conf=is_host=true"]
        process = start([sys.executable, "-m", "engine.elastic", *flags, "train.py", "--config"], [], tmp_path / "log")
        with cleaned_up(process):
            assert process.wait(60) == 2
    assert (tmp_path / "log").read_text().strip().splitlines()[-1].startswith("error: the launch failed")


def test_H6_a_mistake_ends_a_launch_with_a_sentence(tmp_path: Path) -> None:
    flags = ["--standalone", "--nproc_per_node=1", "train.py", "--config"]
    process = start([sys.executable, "-m", "engine.elastic", *flags], ["learnig_rate=1"], tmp_path / "log")
    with cleaned_up(process):
        assert process.wait(60) == 2
    output = (tmp_path / "log").read_text()
    assert output.strip().splitlines()[-1] == "error: rank 0 ended with exit code 2 (its message is above)"
    assert "unknown key" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("number", "codes", "code", "said"),
    [
        (signal.SIGTERM, (75, 75), 75, "stopped by SIGTERM: every process has saved"),
        (signal.SIGINT, (130, 75), 130, "stopped by SIGINT: every process has saved"),
        (signal.SIGTERM, (75, -9), 143, "stopped by SIGTERM: not every process has saved"),
        (signal.SIGUSR1, (), 138, "stopped by SIGUSR1: not every process has saved"),
    ],
)
def test_H6_the_last_line_of_a_stopped_launch(
    number: signal.Signals, codes: tuple[int, ...], code: int, said: str
) -> None:
    found, line = elastic.describe_stop(number, codes)
    assert found == code and line.startswith(said)
