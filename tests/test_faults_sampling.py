"""Faults G7, H3, H5, H7: sampling that is killed is finished exactly; networks and videos that are not finite."""

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import cli
from engine.errors import PREEMPTED_EXIT, SamplesNotWritten
from models.autoencoder import LatentCodec
from sample import sample, sample_ddp, sample_folder, sample_t2x
from sample.decoding import require_finite_videos
from sample.generate import Generator
from sample.labels import label_name
from sample.pipeline_latte import LatteVideoPipeline
from tests.fault_support import Job, all_gone, begin_rank, call, rank_context, seal, torchrun
from tests.t2v_support import theirs, tiny_pipeline

pytestmark = pytest.mark.timeout(600)

Files = dict[str, bytes]
COUNT = 17  # in batches of 2: the last one goes beyond it


def files_of(folder: Path) -> Files:
    """The mp4s and arrays of a job, hidden ones included."""
    found = [path for path in folder.rglob("*") if path.suffix in (".mp4", ".npy")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def finished(folder: Path) -> Files:
    """Returns `files_of` a finished job, which left nothing else."""
    names = {path.name for path in folder.iterdir()}
    assert names == {"videos", "lossless", "settings.json", "samples.json", "samples.gif", "samples.png"}
    return files_of(folder)


def assert_unfinished(folder: Path, whole: Files) -> None:
    """Asserts that named files are complete, incomplete ones are set aside, and nothing marks the job as done."""
    files = files_of(folder)
    named = {name: content for name, content in files.items() if not name.startswith(".unfinished/")}
    assert named.items() <= whole.items() and len(named) < len(whole)
    assert not (folder / "samples.json").exists()


def nth_call(owner: Any, name: str, number: int, fault: Callable[..., None]) -> None:
    """Makes the `number`-th call of `owner.name` in this process begin with `fault(*its arguments)`."""
    honest, calls = getattr(owner, name), [0]

    def faulty(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            fault(*arguments)
        return honest(*arguments)

    setattr(owner, name, faulty)


def die(*_: Any, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def die_amid_a_file(path: Path, *_: Any) -> None:
    path.write_bytes(b"half a video")
    die()


def refuse(*_: Any) -> None:
    raise ValueError("this machine has no such codec")


def no_space(*_: Any) -> None:
    """From now on the kernel refuses to let a file grow beyond 1000 bytes: an array fits, an mp4 does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoil(codec: LatentCodec, latents: torch.Tensor) -> None:
    """One number of the batch's last video is not finite."""
    latents[-1, -1, -1, -1, -1] = math.inf


FAULTS: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "half": (sample_folder, "write_mp4", die_amid_a_file),
    "between": (sample_folder, "write_mp4", die),  # the array is there, the mp4 is not
    "step": (sample_ddp.Job, "_check_signals", die),
    "term": (sample_ddp.Job, "_check_signals", partial(die, number=signal.SIGTERM)),
    "load": (sample_ddp, "load_generator", refuse),
    "disk": (sample_folder, "write_mp4", no_space),
    "infinite": (LatentCodec, "decode", spoil),
}


def rank_main(rank: int, size: int, port: int, arguments: list[str], fault: str, log: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    begin_rank()
    kind, _, (where) = fault.partition("@")
    if kind and int(where.split(":")[0]) == rank:
        nth_call(*FAULTS[kind][:2], int(where.split(":")[1]), FAULTS[kind][2])
    sys.argv = ["sample_ddp.py", *arguments]
    cli.run(sample_ddp.main)


def sample_on(size: int, arguments: list[str], folder: Path, fault: str = "") -> tuple[list[int], list[str]]:
    """Exit codes and output of a job's ranks. When one fails the others get SIGTERM, as from torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = rank_context()
    logs = [folder.parent / f"{folder.name}.rank{rank}.log" for rank in range(size)]
    command = [*arguments, "--save_video_path", str(folder), "--device", "cpu"]
    places = [(rank, size, port, command, fault, logs[rank]) for rank in range(size)]
    ranks = [context.Process(target=rank_main, args=place) for place in places]
    for process in ranks:
        process.start()
    try:
        deadline = time.monotonic() + 300
        while any(process.is_alive() for process in ranks):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.terminate()
                    process.join(20)
            time.sleep(0.02)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in ranks], [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def tiny_job(checkpoint: Path) -> list[str]:
    return ["--ckpt", str(checkpoint), "--num_videos", str(COUNT), "--batch_size", "2", "--steps", "4"]


@pytest.fixture(scope="module")
def whole(tiny_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The job that nothing disturbed, in one process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    codes, logs = sample_on(1, tiny_job, folder)
    assert codes == [0], logs
    return finished(folder)


@pytest.mark.dist
def test_G7_three_deaths_and_three_world_sizes(tiny_job: list[str], whole: Files, tmp_path: Path) -> None:
    assert sorted(whole) == sorted(f"{kind}/{index:06d}.{suffix}" for index in range(COUNT)
                                   for kind, suffix in (("videos", "mp4"), ("lossless", "npy")))  # fmt: skip
    folder = tmp_path / "out"
    for size, fault, code in ((2, "half@1:4", -9), (1, "between@0:2", -9), (3, "term@0:2", PREEMPTED_EXIT)):
        codes, logs = sample_on(size, tiny_job, folder, fault)
        assert codes[int(fault[-3])] == code, logs
        assert_unfinished(folder, whole)
    codes, logs = sample_on(2, tiny_job, folder)
    assert codes == [0, 0], logs
    assert finished(folder) == whole


@pytest.mark.dist
def test_G7_a_full_disk_of_one_rank_ends_all(tiny_job: list[str], whole: Files, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    codes, logs = sample_on(2, tiny_job, folder, "disk@1:2")
    assert codes[1] == SamplesNotWritten.exit_code and codes[0] == PREEMPTED_EXIT, logs
    line = logs[1].splitlines()[-1]
    assert line.startswith(f"error (rank 1): {folder / 'videos'}/0000"), line
    assert "could not be written: File too large" in line
    assert "stopped by a signal" in logs[0] and "the same command continues" in logs[0]
    assert_unfinished(folder, whole)
    codes, _ = sample_on(1, tiny_job, folder)
    assert codes == [0] and finished(folder) == whole


@pytest.mark.dist
def test_G7_what_one_rank_cannot_load_ends_all_with_its_sentence(tiny_job: list[str], tmp_path: Path) -> None:
    codes, logs = sample_on(2, tiny_job, tmp_path / "out", "load@1:1")
    assert 2 in codes and 0 not in codes
    # by either or both: the first to end stops the other
    said = [line for log in logs for line in log.splitlines() if "error" in line]
    assert said and set(said) <= {f"error{rank}: this machine has no such codec" for rank in ("", " (rank 1)")}
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.dist
def test_H3_a_video_that_is_not_finite_ends_the_job(tiny_job: list[str], whole: Files, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    codes, logs = sample_on(1, tiny_job, folder, "infinite@0:3")
    assert codes == [2], logs
    assert logs[0].splitlines()[-1].startswith("error: video 5 holds NaN or infinity and is not written: ")
    assert_unfinished(folder, whole)
    assert set(files_of(folder)) == {name for name in whole if name[-10:-4] < "000004"}
    codes, logs = sample_on(1, tiny_job, folder)
    assert codes == [0] and finished(folder) == whole, logs


BOTH = (sample.main, sample_ddp.main)


def refused(main: Callable[[list[str]], int], *arguments: str) -> str:
    """Returns the one sentence with which a command ends after a user's mistake."""
    code, said = call(main, *arguments, "--device", "cpu")
    line = said.splitlines()[-1]
    assert code == 2 and line.startswith("error: "), said
    return line


def videos_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.suffix in (".mp4", ".npy", ".json"))


def with_number(file: Path, name: str, number: float) -> None:
    """Puts `number` into a tensor of a safetensors file."""
    weights = load_file(file)
    weights[name].view(-1)[-1] = number
    save_file(weights, file)


TENSOR = "blocks.1.mlp.fc1.weight"


@pytest.mark.parametrize(("main", "number"), zip(BOTH, (math.nan, -math.inf)), ids=["sample", "sample_ddp"])
def test_H3_a_network_that_is_not_finite_is_refused(
    checkpoint: Path, tmp_path: Path, main: Callable, number: float
) -> None:
    folder, out = shutil.copytree(checkpoint, tmp_path / checkpoint.name), ["--save_video_path", str(tmp_path / "out")]
    with_number(folder / "ema.safetensors", TENSOR, number)
    seal(folder)
    torch.save({"ema": load_file(folder / "ema.safetensors")}, tmp_path / "official.pt")
    official = ["--config", str(folder / "config.yaml"), "--ckpt", str(tmp_path / "official.pt")]
    for arguments, file in (["--ckpt", str(folder)], "ema.safetensors"), (official, "official.pt"):
        line = refused(main, *arguments, *out)
        assert f"{file}: {TENSOR} holds NaN or infinity" in line and not videos_in(tmp_path / "out")
    settings = ["--weights", "raw", "--steps", "2", "--num_videos", "1", "--device", "cpu"]
    assert main(["--ckpt", str(folder), *settings, *out]) == 0, "the other weights are sound"


def test_H3_pipelines_and_adapters_that_are_not_finite_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = LatteVideoPipeline.from_checkpoint(checkpoint, device="cpu").save_pretrained(tmp_path / "pipeline")
    with_number(folder / "model.safetensors", TENSOR, math.nan)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {TENSOR} holds NaN or infinity"):
        LatteVideoPipeline.from_pretrained(folder, device="cpu")
    parts = {"lora_A": torch.zeros(2, 16), "lora_B": torch.full((48, 2), math.nan)}
    save_file({f"base_model.model.blocks.0.attn.qkv.{name}.weight": part for name, part in parts.items()},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    line = refused(sample.main, "--ckpt", str(checkpoint), "--lora", str(tmp_path))
    assert "adapter_model.safetensors: base_model.model.blocks.0.attn.qkv.lora_B.weight holds NaN" in line


def test_H3_guidance_that_makes_no_finite_video(checkpoint: Path, tmp_path: Path) -> None:
    for main in BOTH:
        out = tmp_path / main.__module__
        command = ["--ckpt", str(checkpoint), "--steps", "3", "--save_video_path", str(out)]
        line = refused(main, *command, "--guidance_scale", "1e38")
        assert "video 0 holds NaN or infinity and is not written" in line
        assert set(videos_in(out)) <= {"settings.json"}


def test_H3_videos_before_the_one_that_is_not_finite_stay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentCodec, "decode", LatentCodec.decode)  # put back what `nth_call` replaces
    nth_call(LatentCodec, "decode", 3, spoil)
    command = ["--ckpt", str(checkpoint), "--steps", "2", "--batch_size", "1", "--save_video_path", str(tmp_path)]
    assert "video 2 holds NaN or infinity" in refused(sample.main, *command)
    assert videos_in(tmp_path) == ["0000_falls.mp4", "0001_rises.mp4"]


@pytest.mark.parametrize("where", ["latents", "video"])
def test_H3_latents_and_pixels_are_checked(where: str) -> None:
    tensors = {"latents": torch.zeros(3, 2, 2), "video": torch.zeros(3, 2, 2)}
    require_finite_videos([6, 7, 8], **tensors)
    tensors[where][1, 0, 0] = math.nan
    with pytest.raises(ValueError, match="video 7 holds NaN or infinity"):
        require_finite_videos([6, 7, 8], **tensors)


TEXT_FAULTS = {
    "network": "diffusion_pytorch_model.safetensors: proj_out.bias holds NaN or infinity",
    "guidance": "video 0 holds NaN or infinity",
    "codec": "video 1 holds NaN or infinity",
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_H3_text_to_video_that_is_not_finite(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "latte", tmp_path / "out"
    tiny_pipeline(theirs()).save_pretrained(folder)
    sizes = ["--image_size", "16", "16", "--video_length", "4", "--num_sampling_steps", "2", "--precision", "fp32"]
    command = ["--pretrained_model_path", str(folder), "--prompt", "a disc", *sizes, "--num_videos_per_prompt", "3"]
    command += ["--save_img_path", str(out), "--guidance_scale", "1e38" if fault == "guidance" else "3"]
    if fault == "network":
        with_number(folder / "transformer" / "diffusion_pytorch_model.safetensors", "proj_out.bias", math.nan)
    if fault == "codec":
        monkeypatch.setattr(LatentCodec, "decode", LatentCodec.decode)
        nth_call(LatentCodec, "decode", 2, spoil)
    assert TEXT_FAULTS[fault] in refused(sample_t2x.main, *command)
    assert videos_in(out) == (["0000_a_disc.mp4"] if fault == "codec" else [])


STATES = {
    "[]": "is not a JSON object",
    "half": "is missing or not JSON",
    "{}": "step must be a whole number from 0, not None",
    '{"step": 1, "class_names": 3}': "class_names must be a list of names",
    '{"step": 1, "class_names": [1, 2]}': "class_names must be a list of names",
}


@pytest.mark.parametrize("text", STATES)
def test_H5_a_broken_state(checkpoint: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    (folder / "state.json").write_text(text)
    seal(folder)
    for main in BOTH:
        line = refused(main, "--ckpt", str(folder), "--save_video_path", str(tmp_path / "out"))
        assert f"{folder / 'state.json'}" in line and STATES[text] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [-1, math.nan, 1.5, True, "1", None])
def test_H11_a_manifest_with_a_broken_step(checkpoint: Path, tmp_path: Path, step: Any) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
    line = refused(sample.main, "--ckpt", str(folder))
    assert f"{folder / 'manifest.json'}: step must be a whole number from 0, not {step!r}" in line


def test_H5_fewer_names_than_classes(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    (folder / "state.json").write_text('{"step": 1, "class_names": ["falls"]}')
    seal(folder)
    conditions = Generator.from_checkpoint(folder, device="cpu").conditions
    assert [label_name(conditions, label) for label in (0, 1, None)] == ["falls", "class-001", None]


def test_H5_too_many_videos(checkpoint: Path, tmp_path: Path) -> None:
    for main in BOTH:
        command = ["--ckpt", str(checkpoint), "--save_video_path", str(tmp_path / "out"), "--num_videos", "1000000000"]
        assert "--num_videos 1000000000 is more than 1000000, the limit" in refused(main, *command)
    command = ["--prompt", "a disc", "--num_videos_per_prompt", "1000000000"]
    assert "num_videos_per_prompt must be in [1, 1000000]" in refused(sample_t2x.main, *command)
    assert not (tmp_path / "out").exists()


def demo_job(folder: Path) -> list[str]:
    arguments = ["--config", "configs/demo/demo_sample.yaml", "--device", "cpu"]
    return [*arguments, "--num_videos", "64", "--batch_size", "4", "--save_video_path", str(folder)]


def kill_at(job: Job, folder: Path, count: int, target: str, number: signal.Signals) -> None:
    """Send `number` to torchrun or to a rank when `count` videos are there; return when all its processes are gone."""
    job.wait_until(lambda: len(list(folder.glob("videos/*.mp4"))) >= count)
    family = job.family()
    (family[0] if target == "torchrun" else family[-1]).send_signal(number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(30)
    assert all_gone(family, 10)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_G7_64_demo_videos_killed_at_three_random_points(tmp_path: Path, seed: int) -> None:
    whole = tmp_path / "whole"
    with torchrun(demo_job(whole), ranks=1 + seed, script="sample/sample_ddp.py") as job:
        code, output = job.wait(200)
        assert code == 0, output
    draw, folder, at = random.Random(seed), tmp_path / "killed", 0
    deaths = [("rank", signal.SIGKILL), ("torchrun", signal.SIGKILL), ("torchrun", signal.SIGTERM)]
    draw.shuffle(deaths)
    for ranks, (target, number) in zip((2, 1, 3), deaths, strict=True):
        at += draw.randint(1, 18)
        with torchrun(demo_job(folder), ranks=ranks, script="sample/sample_ddp.py") as job:
            kill_at(job, folder, at, target, number)
        assert_unfinished(folder, finished(whole))
        stems = [{path.stem for path in folder.glob(kind)} for kind in ("videos/*.mp4", "lossless/*.npy")]
        at = len(set.intersection(*stems))  # a kill may come between the two files of a video
    with torchrun(demo_job(folder), ranks=2, script="sample/sample_ddp.py") as job:
        code, output = job.wait(200)
    assert code == 0 and f"{at} of 64 videos are done" in output, output
    assert len(finished(folder)) == 128 and finished(folder) == finished(whole)
