"""sample_t2x.py with a prompt file and on several processes: the bytes of one process, and continuing."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import PREEMPTED_EXIT
from models.text_encoder import Prompt, TextEncoder
from sample import sample_t2x, text_to_video
from sample.text_to_video import FeatureFile
from tests.fault_support import main_rank, on_two_ranks
from tests.t2v_support import theirs, tiny_pipeline

PROMPTS = ["a red disc", "a blue square", "red"]
STEMS = ["0000_a_red_disc", "0001_a_red_disc", "0002_a_blue_square", "0003_a_blue_square", "0004_red", "0005_red"]


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latte")
    tiny_pipeline(theirs()).save_pretrained(folder)
    return folder


def flags(latte: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--pretrained_model_path", str(latte), "--save_img_path", str(out), "--image_size", "16", "16"]
    fixed += ["--num_sampling_steps", "2", "--precision", "fp32", "--device", "cpu", "--num_videos_per_prompt", "2"]
    return [*fixed, *more]


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["--prompt_file", str(tmp_path / "prompts.txt")]


def sample(latte: Path, out: Path, *more: str) -> int:
    return sample_t2x.main(flags(latte, out, "--video_length", "1", *more))


def hashes(folder: Path, kind: str = "png") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(f"0*.{kind}")}


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process SIGTERM at a sampler step, counted over all videos."""
    honest, calls = sample_t2x.Job._check_signals, []

    def check(job: Any) -> None:
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        honest(job)

    monkeypatch.setattr(sample_t2x.Job, "_check_signals", check)


@pytest.mark.dist
def test_an_interrupted_job_continues_on_two_processes_with_the_bytes_of_one(
    latte: Path, tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        named = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        assert sample_t2x.main(flags(latte, tmp_path / "plain", "--video_length", "4", *named)) == 0
        out, length = tmp_path / "job", ["--video_length", "4"]
        interrupt(monkeypatch, step=4)
        assert sample_t2x.main(flags(latte, out, *length, *prompts)) == PREEMPTED_EXIT
    finally:
        torch.set_num_threads(threads)
    gc.collect()  # the lock of a process that ended
    assert list(hashes(out, "mp4")) == [f"{STEMS[0]}.mp4"] and not (out / "samples.json").exists()
    first = (out / f"{STEMS[0]}.mp4").stat().st_mtime_ns
    command = flags(latte, out, *length, *prompts)
    assert on_two_ranks(tmp_path, main_rank, sample_t2x.main, [command, command]) == [0, 0]
    assert (out / f"{STEMS[0]}.mp4").stat().st_mtime_ns == first
    whole = hashes(tmp_path / "plain", "mp4")
    assert hashes(out, "mp4") == whole and sorted(whole) == [f"{stem}.mp4" for stem in STEMS]
    assert len(set(whole.values())) == 6
    written = [json.loads((tmp_path / each / "samples.json").read_text())["videos"] for each in ("plain", "job")]
    for index, (one, two) in enumerate(zip(*written, strict=True)):
        assert two == {**one, "sha256": {one["file"]: whole[one["file"]]}} and one["prompt"] == PROMPTS[index // 2]
    assert sorted(path.name for path in out.iterdir() if path.name[0] != "0") == [
        "samples.json", "samples.png", "settings.json"]  # fmt: skip


def test_only_missing_images_are_sampled_and_only_their_prompts_encoded(
    latte: Path, tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    honest = TextEncoder.encode

    def encode(encoder: TextEncoder, prompt: str, *arguments: Any, **options: Any) -> Prompt:
        encoded.append(prompt)
        return honest(encoder, prompt, *arguments, **options)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    monkeypatch.setattr(text_to_video, "SPOOL_BYTES", 1)  # features on disk
    out = tmp_path / "out"
    assert sample(latte, out, *prompts) == 0 and encoded == PROMPTS
    whole, kept = hashes(out), out / f"{STEMS[2]}.png"
    assert sorted(whole) == [f"{stem}.png" for stem in STEMS]
    (out / f"{STEMS[3]}.png").unlink()
    (out / f"{STEMS[4]}.png").write_bytes(b"")
    before = kept.stat().st_mtime_ns
    assert sample(latte, out, *prompts) == 0 and hashes(out) == whole
    assert encoded[3:] == PROMPTS[1:] and kept.stat().st_mtime_ns == before
    assert sample(latte, out, *prompts) == 0 and len(encoded) == 5, "nothing is left to do"


def test_a_folder_of_other_settings_is_refused(latte: Path, tmp_path: Path, prompts: list[str]) -> None:
    out, other = tmp_path / "out", tmp_path / "network"
    assert sample(latte, out, *prompts) == 0
    theirs(seed=1).save_pretrained(other)
    for changes, difference in (
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--num_videos_per_prompt", "1"], "num_videos_per_prompt: 2 -> 1"),
        (["--prompt", "a cat"], "prompts_sha256: "),
        (["--transformer", str(other)], "network_sha256: "),
    ):
        with pytest.raises(ValueError, match=rf"save_img_path .*out holds videos with other settings \(.*{difference}"):
            sample(latte, out, *([] if "--prompt" in changes else prompts), *changes)
    assert len(hashes(out)) == 6
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"samples\.json exists and is not from a sampling job; name another save_img"):
        sample(latte, out, *prompts)
    (out / "samples.json").unlink()
    (out / "samples.png").unlink()
    with pytest.raises(ValueError, match=rf"{STEMS[0]}\.png exists and is not from a sampling job"):
        sample(latte, out, *prompts)


@pytest.mark.parametrize("spool", [1, 2**20])
def test_features_come_back_unchanged(tmp_path: Path, spool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_to_video, "SPOOL_BYTES", spool)
    whole = [torch.randn(1, 9, 4).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    given = [Prompt(value[:, : 3 + n], value[:, 1 : 4 + n] if n else None) for n, value in enumerate(whole)]
    file = FeatureFile(3, tmp_path)
    for number in (2, 0, 1):
        file.put(number, given[number])
    for number in (1, 0, 2, 1):
        for found, expected in zip(file[number], given[number]):
            assert (found is None and expected is None) or torch.equal(found, expected)
    assert len(file) == 3 and not list(tmp_path.iterdir())
