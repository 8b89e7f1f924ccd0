"""Text to video on the command line and in parts, against diffusers' pipeline with tiny random networks."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import LattePipeline
from PIL import Image
from torch import Tensor

from diffusion import Given
from models.text_encoder import TextEncoder, clean_caption
from sample import sample_t2x
from sample.captions import read_prompts
from sample.generate import to_uint8
from sample.t2x_config import SCHEDULERS, T2XConfig, load_t2x_config
from sample.text_to_video import Sampler, denoise, find_folder, load_codec, make_scheduler
from tests.t2v_support import ours_of, theirs, tiny_pipeline, tiny_vae

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Latte folder, saved by diffusers."""
    folder = tmp_path_factory.mktemp("latte")
    tiny_pipeline(theirs()).save_pretrained(folder)
    tiny_vae(temporal=True).save_pretrained(folder / "vae_temporal_decoder")
    return folder


def tiny(folder: Path, **changes: Any) -> T2XConfig:
    settings: dict[str, Any] = {"image_size": [16, 16], "video_length": 4, "num_sampling_steps": 3, "precision": "fp32"}
    return T2XConfig(**{"pretrained_model_path": str(folder), **settings, **changes})


def both(folder: Path, config: T2XConfig, prompt: str = "a red disc", negative: str = "") -> tuple[Any, Any]:
    """Latents of our three steps and of diffusers' pipeline, from the same noise."""
    noise = torch.randn(1, 4, config.video_length, 8, 8, generator=torch.Generator().manual_seed(1))
    encoder = TextEncoder.from_folder(folder, torch.float32, CPU)
    features = encoder.encode(prompt, negative if config.guidance_scale > 1 else None, clean=False)
    scheduler = make_scheduler(config, folder)
    ours = denoise(ours_of(theirs()), scheduler, features, noise, config, torch.Generator().manual_seed(2))
    pipeline = LattePipeline.from_pretrained(folder, scheduler=make_scheduler(config, folder))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt,
        negative_prompt=negative,
        latents=noise,
        generator=torch.Generator().manual_seed(2),
        num_inference_steps=config.num_sampling_steps,
        guidance_scale=config.guidance_scale,
        video_length=config.video_length,
        eta=config.eta,
        enable_temporal_attentions=config.enable_temporal_attentions,
        height=16,
        width=16,
        clean_caption=False,
        output_type="latent",
    ).frames
    return ours, expected


@pytest.mark.parametrize("method", SCHEDULERS)
def test_every_sampler_equals_diffusers_pipeline(latte: Path, method: str) -> None:
    """Six steps, as samplers of a higher order need some; those that add noise draw the same."""
    ours, expected = both(latte, tiny(latte, sample_method=method, num_sampling_steps=6))
    assert expected.isfinite().all()
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "changes",
    [{"guidance_scale": 1.0}, {"eta": 1.0}, {"video_length": 1}, {"enable_temporal_attentions": False}],
    ids=str,
)
def test_every_setting_equals_diffusers_pipeline(latte: Path, changes: dict[str, Any]) -> None:
    ours, expected = both(latte, tiny(latte, **changes), negative="blurred and much longer than the prompt")
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_learned_variance_is_for_ddpm_alone(latte: Path) -> None:
    """The official script gives it to all ten; of those two then keep three channels, where latents have four."""
    assert make_scheduler(tiny(latte, sample_method="DDPM"), latte).config.variance_type == "learned_range"
    for method in set(SCHEDULERS) - {"DDPM"}:
        assert getattr(make_scheduler(tiny(latte, sample_method=method), latte).config, "variance_type", None) is None


# -------------------------------------------------------------------------------------------- text


def test_features_are_those_of_the_words() -> None:
    text = "a red disc"
    pipeline = tiny_pipeline(theirs())
    encoder = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    found = encoder.encode(text, "", clean=False)
    positive, negative = pipeline.encode_prompt(text, clean_caption=False)
    torch.testing.assert_close(found.positive, positive)
    torch.testing.assert_close(found.negative, negative)
    assert encoder.encode("", "").positive.shape == (1, 1, 12), "an empty prompt has its end mark"


def test_a_long_prompt_is_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline(theirs())
    with caplog.at_level(logging.WARNING):
        prompt = TextEncoder(pipeline.tokenizer, pipeline.text_encoder).encode("a blue square " * 800, None)
    assert prompt.positive.shape[1] == 120
    assert prompt.negative is None
    assert "cut to the 120 that the network knows" in caplog.text


CAPTIONS = [
    ("A Red  Disc", "a red disc"),
    ("see https://a.com/b now", "see now"),
    ("a <b>bold</b> cat&nbsp;here", "a bold cat here"),
    ("photo.jpg of a cat", "of a cat"),
    ("this-is-my-cute-cat", "this is my cute cat"),
    ("well-known", "well-known"),
    ("a “quoted” — ‘text’ here", "a \"quoted\" - 'text' here"),
    ("a cat @user 123456789", "a cat"),
    ("free shipping worldwide: mug", "worldwide: mug"),
    ("640x480 wallpaper", "wallpaper"),
    ("<person> walks", "person walks"),
    ("<script>alert(1)</script>dog", "dog"),
    ("漢字 mountain", "mountain"),
    ("%41%20dog", "a dog"),
    ("end,", "end"),
    ("", ""),
]


@pytest.mark.parametrize(("caption", "clean"), CAPTIONS)
def test_captions_are_cleaned(caption: str, clean: str) -> None:
    assert clean_caption(caption) == clean


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na cat\n\n  a dog  \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    config = T2XConfig(text_prompt=["first"], prompt_file=str(tmp_path / "prompts.txt"))
    assert config.prompts() == ["first", "a cat", "a dog"]


# ---------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("kind", ["four pieces", "all unknown", "another's"])
def test_a_tokenizer_without_its_vocabulary_is_refused(latte: Path, tmp_path: Path, kind: str) -> None:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"<{number}>", -1.0) for number in range({"four pieces": 0, "all unknown": 58, "another's": 100}[kind])]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text_encoder").symlink_to(latte / "text_encoder")
    words = "takes different prompts for the same" if kind == "all unknown" else "do not belong together"
    with pytest.raises(ValueError, match=words) as raised:
        TextEncoder.from_folder(tmp_path, torch.float32, CPU)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------- command line


def command(folder: Path, target: Path, *arguments: str) -> int:
    fixed = ["--pretrained_model_path", str(folder), "--save_img_path", str(target), "--image_size", "16", "16"]
    return sample_t2x.main([*fixed, "--num_sampling_steps", "2", "--precision", "fp32", "--device", "cpu", *arguments])


def test_videos_of_several_prompts(latte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", "a red disc", "--prompt", "../../etc/passwd\n\x1b[31m"]
    assert command(latte, tmp_path, *prompts, "--video_length", "4", "--num_videos_per_prompt", "2") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "0000_a_red_disc.mp4",
        "0001_a_red_disc.mp4",
        "0002_etc_passwd_31m.mp4",
        "0003_etc_passwd_31m.mp4",
        "samples.json",
        "samples.png",
    ]
    assert iio.imread(tmp_path / names[0]).shape == (4, 16, 16, 3)
    said = json.loads((tmp_path / "samples.json").read_text())
    assert [video["index"] for video in said["videos"]] == [0, 1, 2, 3]
    assert said["sample"]["seed"] == 0
    assert "4 videos in" in (out := capsys.readouterr().out)
    assert "GiB of the process" in out


def test_prompts_of_the_command_line_replace_those_of_the_config(latte: Path, tmp_path: Path) -> None:
    (tmp_path / "t2x.yaml").write_text("text_prompt: [from the config, too]\nvideo_length: 1\n")
    (tmp_path / "prompts.txt").write_text("from a file\n")
    for number, (flags, names) in enumerate(
        (
            ([], ["0000_from_the_config.png", "0001_too.png"]),
            (["--prompt_file", str(tmp_path / "prompts.txt")], ["0000_from_a_file.png"]),
            (["--prompt", "mine"], ["0000_mine.png"]),
        )
    ):
        target = tmp_path / str(number)
        assert command(latte, target, "--config", str(tmp_path / "t2x.yaml"), *flags) == 0
        assert sorted(path.name for path in target.glob("0*")) == names


def test_images_with_the_decoder_of_clips_in_half_precision(latte: Path, tmp_path: Path) -> None:
    flags = ["--video_length", "1", "--enable_vae_temporal_decoder", "--precision", "bf16", "--cpu_offload"]
    assert command(latte, tmp_path, "--prompt", "a red disc", *flags, "--no-clean_caption") == 0
    assert Image.open(tmp_path / "0000_a_red_disc.png").size == (16, 16)


def test_a_video_depends_on_seed_and_index_alone(latte: Path) -> None:
    config = tiny(latte, sample_method="EulerAncestralDiscrete", video_length=3)
    encoder = TextEncoder.from_folder(latte, torch.float32, CPU)
    prompt = encoder.encode("a red disc", "")
    sampler = Sampler(config, latte, CPU)
    first, second, again = (sampler.sample(prompt, index) for index in (0, 1, 0))
    assert first.shape == (3, 16, 16, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    other = Sampler(replace(config, seed=1), latte, CPU).sample(prompt, 0)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", ["AutoencoderKL", "temporal"])
def test_chunks_and_slices_change_no_pixel_of_single_frames(latte: Path, name: str) -> None:
    config = tiny(latte, enable_vae_temporal_decoder=name == "temporal")
    latents = torch.randn(1, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = load_codec(config, latte, CPU).decode(latents)
    parts = load_codec(replace(config, decode_chunk_size=2), latte, CPU).decode(latents)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert whole.std() > 0.01
    if name == "AutoencoderKL":
        sliced = load_codec(replace(config, vae_slicing=True, vae_tiling=True), latte, CPU).decode(latents)
        torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t2v", "t2i"])
def test_shipped_configs(name: str) -> None:
    config = load_t2x_config(ROOT / "configs" / "t2x" / f"{name}_sample.yaml", {})
    assert config.video_length == (16 if name == "t2v" else 1)
    assert config.enable_vae_temporal_decoder == (name == "t2v")
    assert (config.guidance_scale, config.num_sampling_steps, config.sample_method) == (7.5, 50, "DDIM")
    assert (config.image_size, config.precision, len(config.prompts())) == ([512, 512], "fp16", 6)


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "transformer", "scheduler", "vae"])
def test_a_missing_part_is_named(latte: Path, tmp_path: Path, part: str) -> None:
    for each in latte.iterdir():
        if each.name != part:
            (tmp_path / each.name).symlink_to(each)
    with pytest.raises(FileNotFoundError, match=f"has no sub-folder {part}, "):
        command(tmp_path, tmp_path / "out", "--prompt", "a", "--video_length", "1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("use_fp16: true", "unknown key 'use_fp16': write precision"),
        ("run_time: 0", "files are numbered"),
        ("guidance: 2", "did you mean 'guidance_scale'"),
        ("sample_method: ddim", "sample_method must be one of DDIM, EulerDiscrete, DDPM"),
        ("image_size: [511, 512]", "image_size must be"),
        ("image_size: 512", "image_size"),
        ("video_length: 0", "video_length must be at least 1"),
        ("eta: 0.5\nsample_method: DDPM", "eta=0.5 is read only with"),
        ("beta_start: 0.5", "beta_start and beta_end"),
        ("seed:", "seed"),
        ("precision: int8", "precision must be one of"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t2x.yaml").write_text(text)
    with pytest.raises(ValueError) as raised:
        load_t2x_config(tmp_path / "t2x.yaml", {})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_mistakes(latte: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no prompt"):
        command(latte, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_folder(T2XConfig(pretrained_model_path=str(tmp_path / "absent")))
    with pytest.raises(FileNotFoundError, match="could not be had from the hub"):
        find_folder(T2XConfig(pretrained_model_path="no_such_owner/no-such-model"))
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        command(latte, tmp_path, "--prompt_file", str(tmp_path / "empty.txt"))


def test_a_decoder_of_other_channels(latte: Path, tmp_path: Path) -> None:
    theirs(in_channels=3, out_channels=6).save_pretrained(tmp_path / "network")
    with pytest.raises(ValueError, match="takes 4 latent channels, but the network makes 3"):
        command(latte, tmp_path, "--prompt", "a", "--transformer", str(tmp_path / "network"))


def test_a_hub_name_through_a_local_stand_in(
    latte: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(latte)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_folder(T2XConfig(revision="v1")) == latte
    assert (asked["name"], asked["revision"]) == ("maxin-cn/Latte-1", "v1")
    assert "transformer/*" in asked["allow_patterns"]
    assert f"maxin-cn/Latte-1: revision v1, commit {latte.name}" in caplog.text


# ------------------------------------------------------------------------ given frames and windows


def given_image(folder: Path) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    return folder / "first.png", pixels


@pytest.mark.parametrize("method", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_known_frames_stay_and_frames_by_themselves_are_sampled_as_ever(latte: Path, method: str) -> None:
    config = tiny(latte, sample_method=method, enable_temporal_attentions=False, guidance_scale=3.0)
    features = TextEncoder.from_folder(latte, torch.float32, CPU).encode("a red disc", "", clean=False)
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    known = Given(torch.randn(1, 4, 4, 8, 8), torch.tensor([[True, False, False, True]]))

    def latents(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        model, scheduler = ours_of(theirs()), make_scheduler(config, latte)
        return denoise(model, scheduler, features, noise, config, generator, **options).transpose(1, 2)

    found, plain = latents(known=known), latents()
    assert torch.equal(found[known.frames], known.latents[known.frames])
    torch.testing.assert_close(found[:, 1:3], plain[:, 1:3], rtol=1e-4, atol=1e-4)


def test_videos_begin_with_an_image_also_in_windows(latte: Path, tmp_path: Path) -> None:
    file, pixels = given_image(tmp_path)
    prompt = TextEncoder.from_folder(latte, torch.float32, CPU).encode("a red disc", "")
    expected = None
    for window_method in ("fused", "autoregressive"):
        long = {"video_length": 9, "window": 4, "overlap": 2, "window_method": window_method}
        sampler = Sampler(tiny(latte, first_frame=[str(file)], **long), latte, CPU)
        steps: list[int] = []
        video = sampler.sample(prompt, 0, lambda *_, steps=steps: steps.append(1))
        assert video.shape == (9, 16, 16, 3) and len(steps) == sampler.num_steps
        clip = torch.from_numpy(pixels).permute(2, 0, 1)[None, None] / 127.5 - 1
        expected = to_uint8(sampler.codec.decode(sampler.codec.encode(clip)))[0, 0]
        assert np.abs(video[0].astype(int) - expected).max() <= 1  # what the codec makes of it
    one = Sampler(tiny(latte, window=4), latte, CPU).sample(prompt, 0)
    np.testing.assert_array_equal(one, Sampler(tiny(latte), latte, CPU).sample(prompt, 0))


def test_wrong_given_frames_are_one_sentence(latte: Path, tmp_path: Path) -> None:
    file = str(given_image(tmp_path)[0])
    for changes, sentence in (
        ({"first_frame": [file], "image_size": [16, 32]}, "cut to a square"),
        ({"given_frames": 2}, "given_frames=2 is read only with given"),
        ({"window": 4, "overlap": 4}, "from 1 to window - 1 = 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny(latte, **changes)
    with pytest.raises(ValueError, match=r"first_frame: \S+ is not a readable image"):
        Sampler(tiny(latte, first_frame=[str(tmp_path / "none.png")]), latte, CPU)
    with pytest.raises(ValueError, match="leave nothing to sample"):
        Sampler(tiny(latte, first_frame=[file], video_length=1), latte, CPU)
