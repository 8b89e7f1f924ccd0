"""Text to video on the command line and in parts, against diffusers' pipeline with tiny random networks."""

from __future__ import annotations

import json
import logging
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import LattePipeline
from PIL import Image

from diffusion.scheduled import SCHEDULERS
from engine.cli import run
from models.text_encoder import TextEncoder, clean_caption
from sample import sample_t2x
from sample.captions import read_prompts
from sample.t2x_config import T2XConfig, load_t2x_config
from sample.text_model import FolderModel
from sample.text_to_video import Sampler, build_schedule, denoise, load_codec
from tests.t2v_support import inputs, ours_of, theirs, tiny_pipeline, tiny_vae

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
    schedule, generator = build_schedule(config, FolderModel(folder)), torch.Generator().manual_seed(2)
    ours = denoise(ours_of(theirs()), schedule, features, noise.transpose(1, 2), config, generator).transpose(1, 2)
    pipeline = LattePipeline.from_pretrained(folder, scheduler=schedule.build_scheduler(config.sample_method))
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
    schedule = build_schedule(tiny(latte), FolderModel(latte))
    assert schedule.build_scheduler("DDPM").config.variance_type == "learned_range"
    for method in set(SCHEDULERS) - {"DDPM"}:
        assert getattr(schedule.build_scheduler(method).config, "variance_type", None) is None


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
    assert "is cut to 120, the most that the network takes" in caplog.text


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
    words = "encodes different prompts alike" if kind == "all unknown" else "do not belong together"
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
    sampler = Sampler(config, FolderModel(latte), CPU)
    first, second, again = (sampler.sample(prompt, index) for index in (0, 1, 0))
    assert first.shape == (3, 16, 16, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    other = Sampler(replace(config, seed=1), FolderModel(latte), CPU).sample(prompt, 0)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", ["AutoencoderKL", "temporal"])
def test_chunks_and_slices_change_no_pixel_of_single_frames(latte: Path, name: str) -> None:
    config = tiny(latte, enable_vae_temporal_decoder=name == "temporal")
    latents = torch.randn(1, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = load_codec(config, FolderModel(latte), CPU).decode(latents)
    parts = load_codec(replace(config, decode_chunk_size=2), FolderModel(latte), CPU).decode(latents)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert whole.std() > 0.01
    if name == "AutoencoderKL":
        sliced = load_codec(replace(config, vae_slicing=True, vae_tiling=True), FolderModel(latte), CPU).decode(latents)
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
        ("eta: 0.5\nsample_method: DDPM", "eta is read only with sample_method=DDIM"),
        ("beta_start: 0.5\nbeta_end: 0.1", "beta_start and beta_end"),
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
    with pytest.raises(ValueError, match="is a local folder, which has no revision v1: leave the revision out"):
        FolderModel.find(T2XConfig(pretrained_model_path=str(latte), revision="v1"))
    with pytest.raises(ValueError, match="num_sampling_steps=1001 is more than the 1000 steps of the noise schedule"):
        build_schedule(tiny(latte, num_sampling_steps=1001), FolderModel(latte))
    with pytest.raises(ValueError, match="there is no prompt"):
        command(latte, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        FolderModel.find(T2XConfig(pretrained_model_path=str(tmp_path / "absent")))
    with pytest.raises(FileNotFoundError, match="could not be downloaded from the hub"):
        FolderModel.find(T2XConfig(pretrained_model_path="no_such_owner/no-such-model"))
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
    assert FolderModel.find(T2XConfig(revision="v1")).folder == latte
    assert (asked["name"], asked["revision"]) == ("maxin-cn/Latte-1", "v1")
    assert "transformer/*" in asked["allow_patterns"]
    assert f"maxin-cn/Latte-1: revision v1, commit {latte.name}" in caplog.text


# ------------------------------------------------------------------------------- memory and adapters


def test_the_text_encoder_is_let_go_before_the_network_comes(latte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    plain = TextEncoder.from_folder.__func__  # type: ignore[attr-defined]

    def remembered(cls: type, *arguments: Any, **options: Any) -> TextEncoder:
        made = plain(cls, *arguments, **options)
        alive.append(weakref.ref(made.network))
        return made

    monkeypatch.setattr(TextEncoder, "from_folder", classmethod(remembered))
    assert len(sample_t2x.encode_all(tiny(latte), FolderModel(latte), ["a", "b"], CPU)) == 2
    assert alive[0]() is None


def test_quantised_networks_sample_nearly_the_same_video(latte: Path, tmp_path: Path) -> None:
    videos = []
    for number, kind in enumerate(("int8", None)):
        flags = ["--quantize_text_encoder", kind, "--quantize_transformer", kind] if kind else []
        target = tmp_path / str(number)
        assert command(latte, target, "--prompt", "a red disc", "--video_length", "1", *flags) == 0
        videos.append(np.asarray(Image.open(target / "0000_a_red_disc.png")).astype(float))
    assert 0 < np.abs(videos[0] - videos[1]).mean() < 4  # of 255


def test_adapters_on_the_command_line(latte: Path, tmp_path: Path) -> None:
    """Merged into what is sampled, in the share that --lora_scale says; and by the converter."""
    from models.convert_t2v import load_t2v
    from models.lora import LoraConfig, add_lora, lora_weights, save_lora
    from tools import convert

    model = ours_of(theirs())
    add_lora(model, LoraConfig(rank=2))
    for value in lora_weights(model.state_dict()).values():
        torch.nn.init.normal_(value, std=0.5)
    adapter = str(save_lora(lora_weights(model.state_dict()), LoraConfig(rank=2), tmp_path / "adapter"))
    merged = str(tmp_path / "merged")
    assert convert.main(["t2v", str(latte), merged, "--lora", adapter, "--lora_scale", "0.5"]) == 0
    given = inputs()
    assert (load_t2v(merged)(**given).sample - ours_of(theirs())(**given).sample).abs().max() > 0.1
    pictures = []
    for number, flags in enumerate((["--lora", adapter, "--lora_scale", "0.5"], ["--transformer", merged], [])):
        target = tmp_path / str(number)
        assert command(latte, target, "--prompt", "a", "--video_length", "1", *flags) == 0
        pictures.append((target / "0000_a.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_compile_reaches_the_blocks_and_the_decoder(latte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda self: compiled.append(type(self).__name__))
    Sampler(tiny(latte, compile=True), FolderModel(latte), CPU)
    assert compiled == ["T2VBlock"] * 4 + ["Decoder"]


# -------------------------------------------------------------------- mistakes, as a user meets them


def said_by(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and what is printed beside the progress bar, of the command line itself."""
    fixed = ["--image_size", "16", "16", "--num_sampling_steps", "2", "--precision", "fp32", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["sample_t2x.py", *fixed, "--video_length", "1", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(sample_t2x.main)
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    return ended.value.code or 0, "\n".join(
        line for line in lines if line and "step/s" not in line and "it/s" not in line
    )


BROKEN = [  # file, what is said where it is missing, and where it is cut off
    ("text_encoder/model.safetensors", "text_encoder could not be loaded: Error no file named", "could not be loaded"),
    ("text_encoder/config.json", "text_encoder/config.json is missing", "text_encoder/config.json is not valid JSON"),
    ("tokenizer/tokenizer.json", "the tokenizer has", "could not be loaded"),
    ("transformer/diffusion_pytorch_model.safetensors", "transformer holds no weights", "not a complete safetensors"),
    ("transformer/config.json", "transformer holds no network", "transformer/config.json is not valid JSON"),
    ("scheduler/scheduler_config.json", "scheduler_config.json is missing", "scheduler_config.json is not valid JSON"),
    ("vae/diffusion_pytorch_model.safetensors", "could not be loaded as AutoencoderKL", "could not be loaded as Auto"),
    ("vae/config.json", "vae/config.json is missing", "vae/config.json is not valid JSON"),
]


@pytest.mark.parametrize(("file", "missing", "cut"), BROKEN, ids=[each[0] for each in BROKEN])
def test_a_broken_file_is_one_sentence(
    file: str, missing: str, cut: str, latte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "latte"
    shutil.copytree(latte, folder)
    given = ["--pretrained_model_path", str(folder), "--prompt", "a", "--save_img_path", str(tmp_path / "out")]
    for words in (cut, missing):
        (folder / file).write_bytes((folder / file).read_bytes()[:100]) if words == cut else (folder / file).unlink()
        code, said = said_by(monkeypatch, capfd, *given)
        assert code == 2 and words in said.splitlines()[-1] and "Traceback" not in said, said
        assert said.splitlines()[-1].startswith("error: ")


def test_an_encoder_that_is_not_its_configs_is_one_sentence(latte: Path, tmp_path: Path) -> None:
    folder = tmp_path / "latte"
    shutil.copytree(latte, folder)
    described = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**described, "d_ff": 64}))
    with pytest.raises(ValueError, match=r"missing or have another shape than in its config\.json") as raised:
        TextEncoder.from_folder(folder, torch.float32, CPU)
    assert "\n" not in str(raised.value)


def broken(latte: Path, folder: Path, without: str) -> Path:
    """The folder without one of its parts."""
    folder.mkdir()
    for each in latte.iterdir():
        if each.name != without:
            (folder / each.name).symlink_to(each)
    return folder


@pytest.mark.parametrize("kind", ["tokenizer", "sub-folder", "channels", "bitsandbytes", "lora", "hub"])
def test_one_sentence_and_exit_code_2(
    kind: str, latte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, flags, words = latte, [], ""
    if kind == "tokenizer":
        from transformers import T5Tokenizer

        folder = broken(latte, tmp_path / "latte", "tokenizer")
        T5Tokenizer(vocab_file=str(latte / "tokenizer" / "spiece.model")).save_pretrained(folder / "tokenizer")
        words = "the tokenizer has"
    elif kind == "sub-folder":
        folder, words = broken(latte, tmp_path / "latte", "vae"), "has no sub-folder vae"
    elif kind == "channels":
        theirs(in_channels=3, out_channels=6).save_pretrained(tmp_path / "network")
        flags, words = ["--transformer", str(tmp_path / "network")], "takes 4 latent channels, but the network makes 3"
    elif kind == "bitsandbytes":
        flags, words = ["--quantize_text_encoder", "bnb4"], "bitsandbytes, which needs CUDA; use int8 on cpu"
    elif kind == "lora":
        flags, words = ["--lora", str(tmp_path)], "is not a LoRA in peft's format"
    else:
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
        folder, words = Path("no_such_owner/no-such-model"), "could not be downloaded from the hub"
    code, said = said_by(monkeypatch, capfd, "--pretrained_model_path", str(folder), "--prompt", "a", "--save_img_path",
                         str(tmp_path / "out"), *flags)  # fmt: skip
    assert code == 2
    assert said.startswith("error: ") and "\n" not in said and words in said, said


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt '' is empty after cleaning: its video is sampled without a caption"),
        ("https://a.com/b", "the prompt 'https://a.com/b' is empty after cleaning"),
        ("a blue square " * 720, "tokens is cut to 120, the most that the network takes"),
    ],
    ids=["empty", "only an address", "long"],
)
def test_prompts_that_are_odd_are_sampled_and_said(
    prompt: str,
    words: str,
    latte: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = ["--pretrained_model_path", str(latte), "--prompt", prompt, "--save_img_path", str(tmp_path)]
    code, said = said_by(monkeypatch, capfd, *given)
    assert (code, said) == (0, "")
    (warning,) = caplog.records  # which goes to stderr where pytest does not take it
    assert words in warning.getMessage() and "\n" not in warning.getMessage()
    assert len(list(tmp_path.glob("0000_*.png"))) == 1
