"""Sampling of many videos in one process: exact counts, fixed batches, labels by rule, folders that are not ours."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common.storage import FolderLock
from engine.checkpoint import content_sha256, find_checkpoint, read_config
from engine.config import load_config
from engine.distributed import World
from engine.errors import SamplesNotWritten
from engine.weights import load_model_weights
from sample import sample_ddp, sample_job
from sample.generate import Generator
from sample.labels import choose_labels
from sample.sample_ddp import main, parse
from sample.video_io import contact_sheet
from tests.conftest import TINY, random_weights, refuses, tree


def sample(checkpoint: Path, folder: Path, *flags: object) -> int:
    quick = ["--ckpt", checkpoint, "--save_video_path", folder, "--steps", 3, "--batch_size", 2, "--num_videos", 5]
    return main([str(each) for each in (*quick, "--device", "cpu", *flags)])


def arrays(folder: Path) -> np.ndarray:
    """The job's frames as a reader of metrics finds them: (n, F, H, W, 3)."""
    files = sorted((folder / "lossless").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.npy" for index in range(len(files))]
    return np.stack([np.load(file, mmap_mode="r") for file in files])


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


@pytest.fixture(scope="module")
def five(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five") / "deep" / "out"
    assert sample(checkpoint, folder) == 0
    return folder


@pytest.fixture
def job(five: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(five, tmp_path / "job"))


def test_exactly_n_videos_and_how_they_were_made(checkpoint: Path, five: Path) -> None:
    names = [f"{kind}/{index:06d}.{suffix}" for kind, suffix in (("videos", "mp4"), ("lossless", "npy"))
             for index in range(5)]  # fmt: skip
    overview = ["samples.gif", "samples.json", "samples.png", "settings.json"]
    assert sorted(tree(five)) == sorted([*names, *overview])
    facts = facts_of(five)
    weights = find_checkpoint(checkpoint) / "ema.safetensors"
    assert facts["checkpoint_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (facts["threads"], facts["lossless"], facts["num_frames"], facts["height"]) == (1, True, 4, 8)
    assert [facts["sample"][key] for key in ("steps", "batch_size", "seed")] == [3, 2, 0]
    assert facts["sample"]["save_video_path"] == str(five)
    for entry in facts["videos"]:
        assert entry["file"] == f"videos/{entry['index']:06d}.mp4" and len(entry["sha256"]) == 2
        for name, digest in entry["sha256"].items():
            assert hashlib.sha256((five / name).read_bytes()).hexdigest() == digest


def test_arrays_are_the_frames_and_mp4s_show_them(checkpoint: Path, five: Path) -> None:
    generator = Generator.from_checkpoint(checkpoint, device="cpu")
    expected = generator.sample(indices=range(6), steps=3, batch_size=2)[:5]
    np.testing.assert_array_equal(arrays(five), expected)
    head = (five / "lossless" / "000003.npy").read_bytes()[:8]
    assert head == b"\x93NUMPY\x01\x00"  # version 1
    with av.open(str(five / "videos" / "000003.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (4, 8, 8, 3)
    luma = [pixels @ np.array([0.299, 0.587, 0.114]) for pixels in (expected[3], frames)]  # colour has half the size
    assert np.corrcoef(luma[0].ravel(), luma[1].ravel())[0, 1] > 0.9
    sheet = contact_sheet(expected, ["falls", "rises", "falls", "rises", "falls"])
    np.testing.assert_array_equal(np.asarray(Image.open(five / "samples.png")), sheet)


def test_batches_are_always_whole(checkpoint: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    honest = Generator.decode
    monkeypatch.setattr(Generator, "decode", lambda self, *each: sizes.append(len(each[1])) or honest(self, *each))
    for name in ("000001", "000004"):
        (job / "videos" / f"{name}.mp4").unlink()
    torch.set_num_threads(2)
    assert sample(checkpoint, job) == 0
    assert sizes == [2, 2] and torch.get_num_threads() == 1


def test_without_arrays(checkpoint: Path, five: Path, tmp_path: Path) -> None:
    """The same mp4s; the overview is read back from them."""
    assert sample(checkpoint, tmp_path / "out", "--no-lossless") == 0
    there, other = tree(tmp_path / "out"), tree(five)
    assert {name for name in there if "/" in name} == {name for name in other if name.startswith("videos/")}
    assert all(content == other[name] for name, content in there.items() if "/" in name)
    assert Image.open(tmp_path / "out" / "samples.png").size == Image.open(five / "samples.png").size


def test_networks_of_other_kinds(tmp_path: Path) -> None:
    """Unconditional, from an official file with --config, in bf16."""
    config = load_config(None, [*TINY, "model.num_classes=0"])
    torch.save({"ema": random_weights(config, 1)}, tmp_path / "official.pt")
    (tmp_path / "official.yaml").write_text(config.to_yaml())
    folders = [tmp_path / "bf16", tmp_path / "again", tmp_path / "fp32"]
    for folder, precision in zip(folders, ("bf16", "bf16", "fp32"), strict=True):
        flags = ["--config", tmp_path / "official.yaml", "--precision", precision]
        assert sample(tmp_path / "official.pt", folder, *flags) == 0
    assert {entry["label"] for entry in facts_of(folders[0])["videos"]} == {None}
    np.testing.assert_array_equal(arrays(folders[0]), arrays(folders[1]))
    assert not np.array_equal(arrays(folders[0]), arrays(folders[2]))
    file = hashlib.sha256((tmp_path / "official.pt").read_bytes()).hexdigest()
    assert facts_of(folders[0])["checkpoint_sha256"] == file


def test_the_command_samples_the_labels_of_its_rule(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--label_rule", "random", "--seed", 6, "--num_videos", 8]
    assert sample(checkpoint, tmp_path / "out", *flags) == 0
    generator = Generator.from_checkpoint(checkpoint, device="cpu")
    label_of = choose_labels(generator.conditions, rule="random", seed=6)
    labels = [label_of(index) for index in range(8)]
    assert set(labels) == {0, 1} and labels != [0, 1] * 4
    assert [entry["label"] for entry in facts_of(tmp_path / "out")["videos"]] == labels
    expected = generator.sample(num=8, label_rule="random", seed=6, steps=3, batch_size=2)
    np.testing.assert_array_equal(arrays(tmp_path / "out"), expected)


def test_all_labels_stand_above_those_of_the_yaml(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model: {num_classes: 2}\nsample: {labels: [1]}\n")
    for flags, labels in (([], {1}), (["--labels", "all"], {0, 1})):
        folder = tmp_path / str(len(flags))
        assert sample(checkpoint, folder, "--config", tmp_path / "one.yaml", *flags) == 0
        assert {entry["label"] for entry in facts_of(folder)["videos"]} == labels


def test_more_videos_go_on_and_fewer_are_refused(checkpoint: Path, five: Path, job: Path, tmp_path: Path) -> None:
    sentence = "--num_videos 3, but .*videos holds video 4: .*ask for more or name another"
    refuses(sentence, sample, checkpoint, job, "--num_videos", 3)
    assert tree(job) == tree(five)
    assert sample(checkpoint, job, "--num_videos", 7) == 0
    assert sample(checkpoint, tmp_path / "seven", "--num_videos", 7) == 0
    kept = [name for name in tree(job) if "/" in name]
    assert len(kept) == 14 and all(tree(job)[name] == tree(tmp_path / "seven")[name] for name in kept)
    assert len(facts_of(job)["videos"]) == 7


def test_only_what_is_missing_is_written(checkpoint: Path, five: Path, job: Path) -> None:
    """A batch of which one file is gone; an array that was cut; an mp4 of nothing; what a kill left."""
    (job / "samples.json").unlink()
    (job / "lossless" / "000003.npy").unlink()
    cut = job / "lossless" / "000001.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    np.save(job / "lossless" / "000000.npy", np.zeros((4, 8, 8), np.uint8))  # whole, and of another shape
    (job / "videos" / "000004.mp4").write_bytes(b"")
    (job / ".unfinished").mkdir()
    for name in ("000001.mp4", ".000001.4711.mp4", "000001.npy", "settings.json", "samples.gif"):
        (job / ".unfinished" / name).write_bytes(b"half")
    untouched = {path: path.stat().st_mtime_ns for kind in ("videos", "lossless") for path in (job / kind).iterdir()}
    for written in (cut, job / "lossless" / "000000.npy", job / "videos" / "000004.mp4"):
        del untouched[written]
    assert sample(checkpoint, job) == 0
    before, after = tree(five), tree(job)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"samples.json"}
    assert untouched == {path: path.stat().st_mtime_ns for path in untouched}


def test_settings_cannot_change(checkpoint: Path, five: Path, job: Path) -> None:
    for flags, difference in (
        (["--seed", 1], "sample.seed: 0 -> 1"),
        (["--batch_size", 4], "sample.batch_size: 2 -> 4"),
        (["--labels", "1"], r"sample.labels: None -> \['1'\]"),
        (["--precision", "bf16"], "sample.precision: fp32 -> bf16"),
        (["--fps", 4], "sample.fps: 8 -> 4"),
        (["--threads", 2], "threads: 1 -> 2"),
        (["--no-lossless"], "lossless: True -> False"),
        (["data.num_frames=6"], "data.num_frames: 4 -> 6"),
        (["codec.scale=2"], "codec.scale: 1.0 -> 2.0"),
    ):
        sentence = rf"holds videos with other settings \(.*{difference}.*\): name another"
        refuses(sentence, sample, checkpoint, job, *flags)
    assert tree(job) == tree(five)


def test_the_hash_of_a_codec_is_that_of_its_weights() -> None:
    one, other = (torch.nn.Linear(2, 2) for _ in range(2))
    assert content_sha256(one) != content_sha256(other)
    other.load_state_dict(one.state_dict())
    assert content_sha256(one) == content_sha256(other) != content_sha256(one.to(torch.bfloat16))


def test_other_weights_are_refused_and_the_same_elsewhere_are_not(checkpoint: Path, job: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    assert sample(moved, job) == 0
    settings = json.loads((job / "settings.json").read_text())["settings"]
    assert settings["codec_sha256"] and not {"codec.path", "codec.subfolder", "codec.revision"} & settings.keys()
    config, weights = read_config(find_checkpoint(checkpoint)), load_model_weights(checkpoint)
    assert config is not None
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    torch.save(weights, tmp_path / "same.pt")
    refuses(r"other settings \(checkpoint_sha256: ", sample, tmp_path / "same.pt", job, "--config", tmp_path / "c.yaml")


def test_settings_of_a_job_without_videos_may_change(checkpoint: Path, tmp_path: Path) -> None:
    refuses("label 7 is out of range", sample, checkpoint, tmp_path / "out", "--labels", "7")
    assert sample(checkpoint, tmp_path / "out") == 0


def test_a_finished_job_on_another_machine(checkpoint: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((job / "settings.json").read_text())
    settings["machines"] = ["torch 2.0.0 on cuda Some GPU"]
    (job / "settings.json").write_text(json.dumps(settings))
    before, marks = tree(job), {path: path.stat().st_mtime_ns for path in (job / "videos").iterdir()}
    assert sample(checkpoint, job) == 0
    assert "warning: sampled with torch 2.0.0 on cuda Some GPU; torch" in capsys.readouterr().err
    assert len(json.loads((job / "settings.json").read_text())["machines"]) == 2
    after = tree(job)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"samples.json", "settings.json"}
    assert marks == {path: path.stat().st_mtime_ns for path in (job / "videos").iterdir()}


def test_what_is_not_ours_stays(checkpoint: Path, tmp_path: Path) -> None:
    strange = {"notes.txt": b"mine", ".unfinished/draft.mp4": b"mine", "clip.mp4": b"mine"}
    folder = tmp_path / "out"
    for name, content in strange.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in ("videos", "samples.json"):  # that of sample.py
        (folder / name).write_bytes(b"mine")
        refuses(rf"out/{name} exists and is not from a sampling job", sample, checkpoint, folder)
        assert (folder / name).read_bytes() == b"mine"
        (folder / name).unlink()
    assert sample(checkpoint, folder) == 0
    there = tree(folder)
    assert len([name for name in there if name.startswith("videos/")]) == 5
    assert all(there[name] == content for name, content in strange.items())


def test_a_stranger_among_the_videos_is_refused(checkpoint: Path, job: Path) -> None:
    for name in ("videos/clip.mp4", "videos/more/000001.mp4", "lossless/7.npy", "videos/000001.MP4"):
        (job / name).parent.mkdir(exist_ok=True)
        (job / name).write_bytes(b"mine")
        below = name.partition("/")[2]
        refuses(rf"holds {below}, which is not a video of this job: move it", sample, checkpoint, job)
        assert (job / name).read_bytes() == b"mine"
        shutil.rmtree(job / "videos" / "more", ignore_errors=True)
        (job / name).unlink(missing_ok=True)


def test_another_programs_settings_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for text in ("{}", "[1]", '{"settings": 3, "machines": []}', "half of i"):
        (tmp_path / "settings.json").write_text(text)
        refuses(r"settings\.json was not written by a sampling job", sample, checkpoint, tmp_path)
        assert (tmp_path / "settings.json").read_text() == text


def test_two_jobs_in_one_folder(checkpoint: Path, job: Path) -> None:
    other = FolderLock(job, "x")
    other.take()
    try:
        refuses(rf"--save_video_path={job} is being written by .*:{os.getpid()}; stop", sample, checkpoint, job)
    finally:
        other.release()


def test_others_writing_nothing_end_the_job(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two, alone: it does its batches, waits a while, and gives up with a sentence."""
    monkeypatch.setattr(sample_job, "PATIENCE_S", 0.2)
    monkeypatch.setattr(sample_job, "PATIENCE_BATCHES", 0)
    monkeypatch.setattr(sample_job, "POLL_S", 0.05)
    monkeypatch.setattr(sample_ddp, "join", lambda device: World(0, 2))
    with pytest.raises(SamplesNotWritten, match="2 videos of other processes are missing, and none has appeared for 0"):
        sample(checkpoint, tmp_path / "out")
    there = sorted(path.name for path in (tmp_path / "out" / "videos").iterdir())
    assert there == ["000000.mp4", "000001.mp4", "000004.mp4"]  # the first and third batch of three
    assert not (tmp_path / "out" / "samples.json").exists()


def test_mistakes(checkpoint: Path, tmp_path: Path) -> None:
    refuses("--device cuda:0", sample, checkpoint, tmp_path / "out", "--device", "cuda:0")
    refuses("--threads must be at least 1, not 0", sample, checkpoint, tmp_path / "out", "--threads", "0")
    assert not (tmp_path / "out").exists()


def test_flags_that_are_absent_stay_out() -> None:
    assert set(parse([])) == {"config", "device", "overrides", "lossless", "threads"}
