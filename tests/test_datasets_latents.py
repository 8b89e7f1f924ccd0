"""Training from latents against the path it replaces: decode, transform, encode."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from datasets import build_dataset
from datasets.latents import LatentCache, StoredClip
from demo.data import write_mp4
from engine.config import load_config
from models.autoencoder import LatentCodec, Posterior
from models.identity import codec_identity, is_same_codec
from tests.conftest import TINY, refuses
from tests.fault_support import rows, run
from tests.latent_support import cache, save_codec
from tools import cache_latents

CODECS = ("AutoencoderKL", "AutoencoderTiny", "pixels")


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("codecs")
    return {"pixels": [], **{name: save_codec(folder / name, name) for name in CODECS[:2]}}


@pytest.fixture(scope="module")
def motley(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good clips of odd sizes; and every kind of clip that is replaced, or used with a remark."""
    root = tmp_path_factory.mktemp("motley")
    rng = np.random.default_rng(0)
    grows = [(9, 9)] * 5 + [(12, 12)] * 4
    for name, sizes in {"a/x": [(13, 10)] * 9, "b/y": [(8, 11)] * 7, "a/short": [(9, 9)] * 3, "b/grows": grows}.items():
        (root / name).mkdir(parents=True)
        for number, size in enumerate(sizes):
            frame = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            frame.save(root / name / f"{number:03d}.png")
    shutil.copytree(root / "a" / "x", root / "b" / "torn")
    (root / "b" / "torn" / "002.png").write_bytes(b"no image")
    levels = rng.integers(0, 256, (90, 3, 32, 32), dtype=np.uint8)  # too long to be decoded whole when it is opened
    write_mp4(root / "a" / "noise.mp4", levels)
    data = (root / "a" / "noise.mp4").read_bytes()
    middle = len(data) // 2
    (root / "a" / "pierced.mp4").write_bytes(data[:middle] + bytes(300) + data[middle + 300 :])
    (root / "a" / "text.mp4").write_text("no video " * 30)
    write_mp4(root / "b" / "whole.mkv", levels[:40])
    (root / "b" / "cut.mkv").write_bytes((root / "b" / "whole.mkv").read_bytes()[:-3000])
    (root / "list.txt").write_text("a/x/003.png\nb/y/000.png a\n")
    return root


MOTLEY = ["data.horizontal_flip=true", "data.num_images=2", "data.labels=class_folders", "data.max_unusable=1"]


def compare(overrides: list[str], cached: Path | str, codec: LatentCodec, epochs: int = 3) -> float:
    """Every sample of both paths is of the same clips, labels and remarks; the largest difference of what is shown."""
    one = build_dataset(load_config(None, overrides).data, seed=5)
    other = build_dataset(load_config(None, [*overrides, f"data.latents={cached}"]).data, seed=5)
    assert one.digest == other.digest and one.class_names == other.class_names
    worst = 0.0
    for epoch in range(epochs):
        for index in range(len(one)):
            a, b = one[epoch, index], other[epoch, index]
            assert a["index"] == b["index"] and torch.equal(a["labels"], b["labels"])
            expected = torch.stack([part for part in codec.posterior(a["video"][None]) if part is not None], 2)[0]
            assert expected.shape == b["latents"].shape
            worst = max(worst, float((expected - b["latents"]).abs().max()))
    assert (one.cut_off, one.looped) == (other.cut_off, other.looped)
    assert {**other.skipped, **pierced(one.skipped)} == {**one.skipped, **pierced(other.skipped)}
    return worst


def pierced(skipped: dict[str, str]) -> dict[str, str]:
    """Without the reason of the damaged stream: the frame that is named first may differ."""
    return {path: "" for path in skipped if path.endswith("pierced.mp4")}


@pytest.fixture(scope="module")
def motley_caches(motley: Path, codecs: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("caches")
    made = {}
    for name in CODECS:
        overrides = [*TINY, *codecs[name], f"data.path={motley}", *MOTLEY]
        made[name] = (overrides, cache(overrides, folder / name))
    return made


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "extra",
    [
        ["data.horizontal_flip=false"],
        ["data.num_frames=3", "data.frame_interval=2", "data.num_images=0"],
        ["data.short_clips=loop", "data.frame_interval=3"],
    ],
    ids=["not mirrored", "other windows", "looped"],
)
def test_every_draw_is_the_online_one(motley_caches: Any, name: str, extra: list[str]) -> None:
    overrides, made = motley_caches[name]
    codec = LatentCodec.from_config(load_config(None, overrides).codec)
    assert compare([*overrides, *extra], made, codec) <= (0 if name == "pixels" else 1e-6)


def test_the_motley_set_is_motley(motley_caches: Any) -> None:
    index = LatentCache.read_index(motley_caches["pixels"][1])
    reasons = cache_latents.find_unusable(index["clips"])
    assert set(reasons) == {"a/text.mp4", "a/pierced.mp4", "b/torn"}
    clips = {clip["name"]: clip for clip in index["clips"]}
    assert clips["a/text.mp4"]["reason"].startswith("is not a video") and "002.png" in reasons["b/torn"]
    kinds = [[run[3] is None for run in clips[name]["runs"]] for name in ("a/pierced.mp4", "b/torn", "b/grows")]
    assert kinds[0][0] and False in kinds[0] and kinds[1] == [True, False, True] and kinds[2] == [True, True]
    assert "cut off" in clips["b/cut.mkv"]["cut_off"] and clips["a/short"]["frames"] == 3
    assert len(index["shards"]) >= 3 and sum("first" in clip for clip in index["clips"]) >= 3


def test_images_of_a_frame_list(motley: Path, codecs: dict[str, list[str]], tmp_path: Path) -> None:
    overrides = [*TINY, f"data.path={motley}", *MOTLEY, f"data.frame_list={motley / 'list.txt'}"]
    made = cache(overrides, tmp_path / "cache")
    assert compare(overrides, made, LatentCodec.from_config(load_config(None, TINY).codec)) == 0


def test_the_videos_may_be_gone(motley_caches: Any) -> None:
    overrides, made = motley_caches["AutoencoderKL"]
    here = build_dataset(load_config(None, [*overrides, f"data.latents={made}"]).data, seed=5)
    gone = build_dataset(load_config(None, [*overrides, "data.path=''", f"data.latents={made}"]).data, seed=5)
    assert here.digest == gone.digest and here.class_names == gone.class_names == ["a", "b"]
    for index in range(len(here)):
        a, b = here[1, index], gone[1, index]
        assert torch.equal(a["latents"], b["latents"]) and torch.equal(a["labels"], b["labels"])


X_START = ["diffusion.prediction=x_start", "model.learn_sigma=false"]  # the loss depends on the latents at once
IMAGES = ["data.num_images=2", "data.horizontal_flip=true"]


@pytest.mark.parametrize(
    ("name", "chunk", "extra"),  # chunks of 4 are filled, those of 16 are not
    [("AutoencoderKL", 4, []), ("AutoencoderKL", 16, IMAGES), ("AutoencoderTiny", 4, IMAGES)],
)
def test_losses_are_the_online_ones(
    tiny: list[str], tmp_path: Path, codecs: dict[str, list[str]], name: str, chunk: int, extra: list[str]
) -> None:
    """data.latents is the only change; the same noise samples the posterior. To 1e-6; of whole chunks every bit."""
    common = [*tiny, *codecs[name], *extra, *X_START, f"codec.chunk_size={chunk}"]
    common += ["train.max_steps=5", "model.label_dropout=0.5"]
    run([*common, f"train.output_dir={tmp_path / 'online'}"])
    made = cache(common, tmp_path / "cache")
    run([*common, f"train.output_dir={tmp_path / 'cached'}", f"data.latents={made}"])
    losses = [[row["loss"] for row in rows(tmp_path / place)] for place in ("online", "cached")]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=0 if chunk == 4 else 1e-6)
    assert len(set(losses[0])) == 5


def test_scale_and_shift_may_change(motley_caches: Any) -> None:
    overrides, made = motley_caches["AutoencoderKL"]
    changed = load_config(None, [*overrides, "codec.scale=0.3", "codec.shift=0.4", f"data.latents={made}"])
    codec = LatentCodec.from_config(changed.codec)
    latents = build_dataset(changed.data, seed=0)[0, 0]["latents"][None]
    video = build_dataset(load_config(None, overrides).data, seed=0)[0, 0]["video"][None]
    noise = torch.randn(latents[:, :, 0].shape)
    drawn = Posterior(*latents.unbind(2)).latents(changed.codec, noise)
    torch.testing.assert_close(drawn, codec.encode(video, noise), rtol=1e-6, atol=1e-6)


def test_strict_stops_at_the_first_clip_that_lacks_something(motley: Path, tmp_path: Path) -> None:
    common = [*TINY, f"data.path={motley}", *MOTLEY, "data.strict=true"]
    refuses(r"text\.mp4: is not a video", cache, common, tmp_path / "one")
    (tmp_path / "set").mkdir()
    shutil.copytree(motley / "b" / "torn", tmp_path / "set" / "torn")
    with pytest.raises(ValueError, match=r"torn: .*002\.png.* is not a readable image"):
        cache([*common, f"data.path={tmp_path / 'set'}", "data.labels=none"], tmp_path / "two")


@pytest.mark.parametrize(("dtype", "relative"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_formats_cost_what_the_index_says(motley_caches: Any, tmp_path: Path, dtype: str, relative: float) -> None:
    """Against the fp32 cache, value by value, through the safetensors library; half the bytes."""
    overrides, exact = motley_caches["AutoencoderKL"]
    made = cache(overrides, tmp_path / "cache", dtype)
    index = LatentCache.read_index(made)
    exact_rows, rows = (
        torch.cat([load_file(file)["latents"] for file in sorted(folder.glob("shard-*.safetensors"))])
        for folder in (exact, made)
    )
    error = (rows.double() - exact_rows.double()).abs()
    assert float(error.max()) == pytest.approx(index["rounding"]["largest"], rel=1e-5) and error.max() > 0
    rms = error.square().mean().sqrt() / exact_rows.double().square().mean().sqrt()
    assert float(rms) == pytest.approx(index["rounding"]["relative_rms"], rel=1e-5)
    assert (error <= relative * exact_rows.abs() + 2**-25).all()
    assert rows.element_size() == 2 and LatentCache.read_index(exact)["rounding"] == {
        "largest": 0.0,
        "relative_rms": 0.0,
    }
    data = build_dataset(load_config(None, [*overrides, f"data.latents={made}"]).data, seed=0)
    assert data[0, 0]["latents"].dtype == rows.dtype


def test_a_run_in_half_precision_trains(tiny: list[str], tmp_path: Path) -> None:
    """bf16 has no counterpart in numpy, and fp64 latents none in the cache."""
    for dtype, precision, workers in (("bf16", "fp64", 1), ("fp16", "bf16", 0)):
        made, folder = cache(tiny, tmp_path / dtype, dtype), tmp_path / f"run {dtype}"
        keys = [f"data.latents={made}", f"train.precision={precision}", f"data.num_workers={workers}"]
        run([*tiny, *keys, f"train.output_dir={folder}", "train.max_steps=2"])
        assert len(rows(folder)) == 2


def test_shards_are_filled_in_order_and_none_is_empty() -> None:
    clips = [StoredClip(str(number), 1, None, frames) for number, frames in enumerate([3, 0, 4, 9, 0, 2, 2, 0])]
    found = [(clip.shard, clip.first) for clip in cache_latents.place_clips(clips, 5)]
    assert found == [(0, 0), (0, 3), (1, 0), (2, 0), (2, 9), (3, 0), (3, 2), (3, 4)]
    assert cache_latents.count_frames(list(cache_latents.place_clips(clips, 5))) == [3, 4, 9, 4]


def test_the_codec_is_known_by_its_weights(tmp_path: Path, codecs: dict[str, list[str]]) -> None:
    """Not by its place or file format; each tensor counts, and the config in its folder."""
    first = load_config(None, [*TINY, *codecs["AutoencoderKL"]]).codec
    known = codec_identity(first)
    copy = AutoencoderKL.from_pretrained(first.path)
    copy.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    copy.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for place in ("pickled", "parts"):
        moved = codec_identity(replace(first, path=str(tmp_path / place)))
        assert moved["sha256"] == known["sha256"] and is_same_codec(known, moved), place
    assert is_same_codec(known, codec_identity(replace(first, scale=2.0, shift=1.0, chunk_size=3)))
    assert not is_same_codec(known, codec_identity(replace(first, dtype="bf16")))
    names = sorted(copy.state_dict())
    for name in (names[0], "encoder.conv_in.weight", names[-1]):
        copy.state_dict()[name].view(-1)[0] += 1e-6
        copy.save_pretrained(tmp_path / "other")
        assert not is_same_codec(known, codec_identity(replace(first, path=str(tmp_path / "other")))), name
        copy.state_dict()[name].view(-1)[0] -= 1e-6


def test_a_codec_that_is_not_here_is_known_by_its_name(codecs: dict[str, list[str]]) -> None:
    here = load_config(None, [*TINY, *codecs["AutoencoderKL"]]).codec
    for name in ("/nowhere/codec", "nobody/nothing-of-this-name"):
        gone = replace(here, path=name)
        assert codec_identity(gone)["sha256"] is None
        assert is_same_codec({**codec_identity(here), "path": name}, codec_identity(gone))
        assert not is_same_codec(codec_identity(here), codec_identity(gone))
