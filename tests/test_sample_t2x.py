"""Text to video on the command line and in parts, against diffusers' pipeline with tiny random networks."""

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import LattePipeline
from PIL import Image
from torch import nn
from transformers import T5Tokenizer

from diffusion.scheduled import SCHEDULERS
from engine.objective import sample_generator
from models.convert_t2v import load_t2v
from models.lora import LoraConfig, add_lora, lora_weights, save_lora
from models.text_encoder import Prompt, TextEncoder, clean_caption
from sample import sample_t2x
from sample.decoding import to_uint8
from sample.generate import Generator
from sample.t2x_config import T2XConfig, load_t2x_config, read_prompts
from sample.text_to_video import Prompts, build_generator, build_schedule, load_codec, open_folder
from tests.conftest import ROOT, refuses
from tests.fault_support import call
from tests.t2v_support import inputs, ours_of, theirs, tiny_pipeline, tiny_vae
from tools import convert

CPU = torch.device("cpu")
PROMPT = "a red disc"


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latte")
    tiny_pipeline(theirs()).save_pretrained(folder)
    tiny_vae(temporal=True).save_pretrained(folder / "vae_temporal_decoder")
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return file


def tiny(folder: Path, **changes: Any) -> T2XConfig:
    settings: dict[str, Any] = {"image_size": [16, 16], "video_length": 4, "num_sampling_steps": 3, "precision": "fp32"}
    return T2XConfig(**{"pretrained_model_path": str(folder), **settings, **changes})


def generator_of(config: T2XConfig, negative: str = "") -> Generator:
    model = open_folder(config)
    encoder = TextEncoder.from_folder(model.text_folder, torch.float32, CPU)
    prompt = encoder.encode(PROMPT, negative if config.guidance_scale > 1 else None, clean=False)
    return build_generator(config, model, [prompt], CPU)


def latents_of(generator: Generator, config: T2XConfig, **changes: Any) -> torch.Tensor:
    """Latents (1, F, C, h, w) of the first video."""
    generator.decode = lambda _, latents: latents.numpy()  # type: ignore[method-assign]
    return torch.from_numpy(generator.sample([0], 1, **config.settings() | changes))


SETTINGS: list[dict[str, Any]] = [
    *({"sample_method": method, "num_sampling_steps": 6} for method in SCHEDULERS),  # some need that many steps
    *({"guidance_scale": 1.0}, {"eta": 1.0}, {"video_length": 1}, {"enable_temporal_attentions": False}),
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_every_setting_equals_diffusers_pipeline(latte: Path, changes: dict[str, Any]) -> None:
    """Compares latents with those of diffusers' pipeline, which draws from the same generator."""
    config, negative = tiny(latte, **changes), "blurred and much longer than the prompt"
    ours = latents_of(generator_of(config, negative), config)
    draws = sample_generator(config.seed, 0, CPU)
    noise = torch.randn(1, 4, config.video_length, 8, 8, generator=draws)
    scheduler = build_schedule(config, open_folder(config)).build_scheduler(config.sample_method)
    pipeline = LattePipeline.from_pretrained(config.pretrained_model_path, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    keys = ("guidance_scale", "video_length", "eta", "enable_temporal_attentions")
    same = {"num_inference_steps": config.num_sampling_steps} | {key: getattr(config, key) for key in keys}
    size: dict[str, Any] = {"height": 16, "width": 16, "clean_caption": False, "output_type": "latent"}
    expected = pipeline(PROMPT, negative_prompt=negative, latents=noise, generator=draws, **same, **size).frames
    assert expected.isfinite().all()
    assert (ours.transpose(1, 2) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_learned_variance_is_for_ddpm_alone(latte: Path) -> None:
    """The official script gives it to all ten; of those two then keep three channels, where latents have four."""
    config = tiny(latte)
    schedule = build_schedule(config, open_folder(config))
    assert schedule.build_scheduler("DDPM").config.variance_type == "learned_range"
    for method in set(SCHEDULERS) - {"DDPM"}:
        assert getattr(schedule.build_scheduler(method).config, "variance_type", None) is None


def test_chunks_and_slices_change_no_pixel_of_single_frames(latte: Path) -> None:
    latents = torch.randn(1, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def decode(**changes: Any) -> torch.Tensor:
        config = tiny(latte, **changes)
        return load_codec(config, open_folder(config), CPU).decode(latents)

    sliced = {"vae_slicing": True, "vae_tiling": True}
    for temporal, ways in ((True, [{}]), (False, [{}, sliced])):
        whole = decode(enable_vae_temporal_decoder=temporal)
        assert whole.std() > 0.01
        for way in ways:
            found = decode(enable_vae_temporal_decoder=temporal, **(way or {"decode_chunk_size": 2}))
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_known_frames_stay_and_independent_frames_are_sampled_as_before(latte: Path, image: Path, method: str) -> None:
    ends = {"first_frame": [str(image)], "last_frame": [str(image)]}
    config = tiny(latte, sample_method=method, guidance_scale=3.0, **ends)
    plain = generator_of(config)
    (prompt,) = plain.conditions.prompts  # type: ignore[attr-defined]
    model = ours_of(theirs()).double()  # in three steps DDPM makes a rounding 10^3 times as large
    model.temporal_transformer_blocks = nn.ModuleList()
    prompts = Prompts([Prompt(prompt.positive.double(), prompt.negative.double())])
    generator = Generator(model, plain.codec, plain.config, prompts, schedule=plain.schedule)
    found, free = latents_of(generator, config), latents_of(generator, config, given=None)
    clean = plain.codec.encode(config.settings()["given"].pixels).double()
    assert found.dtype == torch.float64 and torch.equal(found[:, [0, 3]], clean)
    torch.testing.assert_close(found[:, 1:3], free[:, 1:3], rtol=1e-8, atol=1e-8)


def test_videos_begin_with_an_image_also_in_windows(latte: Path, image: Path) -> None:
    for method, passes in (("fused", 1), ("autoregressive", 4)):
        long = {"video_length": 9, "window": 4, "overlap": 2, "window_method": method}
        config, steps = tiny(latte, first_frame=[str(image)], **long), []
        generator = generator_of(config)
        video = generator.sample([0], 1, callback=lambda *at, steps=steps: steps.append(at), **config.settings())
        assert video.shape == (1, 9, 16, 16, 3) and steps == [(n + 1, 3 * passes) for n in range(3 * passes)]
        expected = to_uint8(generator.codec.decode(generator.codec.encode(config.settings()["given"].pixels)))[0, 0]
        assert np.abs(video[0, 0].astype(int) - expected).max() <= 1  # what the codec makes of it
    one, plain = (generator_of(each).sample([0], 1, **each.settings()) for each in (tiny(latte, window=4), tiny(latte)))
    np.testing.assert_array_equal(one, plain)


def test_features_are_those_of_the_words() -> None:
    pipeline = tiny_pipeline(theirs())
    encoder = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    found = encoder.encode(PROMPT, "", clean=False)
    positive, negative = pipeline.encode_prompt(PROMPT, clean_caption=False)
    torch.testing.assert_close(found.positive, positive)
    torch.testing.assert_close(found.negative, negative)
    assert encoder.encode("", "").positive.shape == (1, 1, 12), "an empty prompt has its end mark"


@pytest.mark.parametrize(
    ("prompt", "words", "length"),
    [
        ("", "the prompt '' is empty after cleaning: its video is sampled without a caption", 1),
        ("https://a.com/b", "the prompt 'https://a.com/b' is empty after cleaning", 1),
        ("a blue square " * 720, "tokens is cut to 120, the network's maximum", 120),
    ],
    ids=["empty", "only an address", "long"],
)
def test_unusual_prompts_are_warned_of(prompt: str, words: str, length: int, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline(theirs())
    found = TextEncoder(pipeline.tokenizer, pipeline.text_encoder).encode(prompt, None)
    assert found.positive.shape[1] == length and found.negative is None
    (warning,) = caplog.records
    assert words in warning.getMessage() and "\n" not in warning.getMessage()


def test_captions_are_cleaned() -> None:
    """By diffusers' rules."""
    for caption, clean in (
        ("A Red  Disc", "a red disc"),
        ("see https://a.com/b now", "see now"),
        ("a <b>bold</b> cat&nbsp;here", "a bold cat here"),
        ("", ""),
    ):
        assert clean_caption(caption) == clean


@pytest.mark.parametrize("kind", ["four pieces", "all unknown", "another's"])
def test_a_tokenizer_without_its_vocabulary_is_refused(latte: Path, tmp_path: Path, kind: str) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"<{number}>", -1.0) for number in range({"four pieces": 0, "all unknown": 58, "another's": 100}[kind])]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text_encoder").symlink_to(latte / "text_encoder")
    words = "encodes different prompts alike" if kind == "all unknown" else "do not belong together"
    refuses(words, TextEncoder.from_folder, tmp_path, torch.float32, CPU)


def test_the_text_encoder_is_freed_before_the_network_is_loaded(latte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    plain = TextEncoder.from_folder.__func__  # type: ignore[attr-defined]

    def remembered(cls: type, *arguments: Any, **options: Any) -> TextEncoder:
        made = plain(cls, *arguments, **options)
        alive.append(weakref.ref(made.network))
        return made

    monkeypatch.setattr(TextEncoder, "from_folder", classmethod(remembered))
    config = tiny(latte)
    assert len(sample_t2x.encode_all(config, open_folder(config), ["a", "b"], CPU)) == 2
    assert alive[0]() is None


def words_of(folder: Path, target: Path, length: int = 1) -> list[str]:
    """Returns the words of the command line that the tests here share."""
    fixed = ["--pretrained_model_path", str(folder), "--save_img_path", str(target), "--image_size", "16", "16"]
    fixed += ["--num_sampling_steps", "2", "--precision", "fp32", "--device", "cpu", "--video_length", str(length)]
    return fixed


def command(folder: Path, target: Path, *arguments: str, length: int = 1) -> int:
    return sample_t2x.main([*words_of(folder, target, length), *arguments])


def test_videos_of_several_prompts(latte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", "a red disc", "--prompt", "../../etc/passwd\n\x1b[31m", "--num_videos_per_prompt", "2"]
    assert command(latte, tmp_path, *prompts, length=4) == 0
    stems = ["0000_a_red_disc", "0001_a_red_disc", "0002_etc_passwd_31m", "0003_etc_passwd_31m"]
    names = [*(f"{stem}.mp4" for stem in stems), "samples.json", "samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert iio.imread(tmp_path / names[0]).shape == (4, 16, 16, 3)
    assert (tmp_path / names[0]).read_bytes() != (tmp_path / names[1]).read_bytes()
    written = json.loads((tmp_path / "samples.json").read_text())
    assert [video["index"] for video in written["videos"]] == [0, 1, 2, 3] and written["sample"]["seed"] == 0
    out, said = capsys.readouterr()
    assert "4 videos in" in out and "GiB (process)" in out
    words = ["opening", "loading the text encoder", "encoding 2 prompt(s)", "loading the network",
             "loading the decoder", "sampling", "decoding", "8/8"]  # fmt: skip
    places = [said.find(each) for each in words]
    assert -1 not in places and places == sorted(places), said


def test_prompts_of_the_command_line_replace_those_of_the_config(latte: Path, tmp_path: Path) -> None:
    (tmp_path / "t2x.yaml").write_text("text_prompt: [from the config, too]\n")
    (tmp_path / "prompts.txt").write_text("# mine\nfrom a file\n\n  twice  \n")
    for flags, names in (
        ([], ["0000_from_the_config.png", "0001_too.png"]),
        (["--prompt_file", str(tmp_path / "prompts.txt")], ["0000_from_a_file.png", "0001_twice.png"]),
        (["--prompt", "mine"], ["0000_mine.png"]),
    ):
        target = tmp_path / names[0]
        assert command(latte, target, "--config", str(tmp_path / "t2x.yaml"), *flags) == 0
        assert sorted(path.name for path in target.glob("0*")) == names
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    refuses("holds no prompt", read_prompts, tmp_path / "empty.txt")


def test_images_with_the_decoder_of_clips_in_half_precision(latte: Path, tmp_path: Path) -> None:
    flags = ["--enable_vae_temporal_decoder", "--precision", "bf16", "--cpu_offload", "--no-clean_caption"]
    assert command(latte, tmp_path, "--prompt", "a red disc", *flags) == 0
    assert Image.open(tmp_path / "0000_a_red_disc.png").size == (16, 16)


def test_quantised_networks_sample_nearly_the_same_video(latte: Path, tmp_path: Path) -> None:
    videos = []
    for number, flags in enumerate((["--quantize_text_encoder", "int8", "--quantize_transformer", "int8"], [])):
        assert command(latte, tmp_path / str(number), "--prompt", "a", *flags) == 0
        videos.append(np.asarray(Image.open(tmp_path / str(number) / "0000_a.png")).astype(float))
    assert 0 < np.abs(videos[0] - videos[1]).mean() < 4  # of 255


def test_adapters_on_the_command_line(latte: Path, tmp_path: Path) -> None:
    """Merged with the weight of --lora_scale, here and by the converter."""
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
        assert command(latte, tmp_path / str(number), "--prompt", "a", *flags) == 0
        pictures.append((tmp_path / str(number) / "0000_a.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_compile_reaches_the_blocks_and_the_decoder(latte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda self: compiled.append(type(self).__name__))
    generator_of(tiny(latte, compile=True))
    assert compiled == ["T2VBlock"] * 4 + ["Decoder"]


@pytest.mark.parametrize("name", ["t2v", "t2i"])
def test_shipped_configs(name: str) -> None:
    config = load_t2x_config(ROOT / "configs" / "t2x" / f"{name}_sample.yaml", {})
    assert config.video_length == (16 if name == "t2v" else 1)
    assert config.enable_vae_temporal_decoder == (name == "t2v")
    assert (config.guidance_scale, config.num_sampling_steps, config.sample_method) == (7.5, 50, "DDIM")
    assert (config.image_size, config.precision, len(config.prompts())) == ([512, 512], "fp16", 6)


def test_wrong_keys(tmp_path: Path) -> None:
    for text, words in (
        ("use_fp16: true", "unknown key 'use_fp16': write precision"),
        ("run_time: 0", "files are numbered"),
        ("guidance: 2", "did you mean 'guidance_scale'"),
        ("sample_method: ddim", "sample_method must be one of DDIM, EulerDiscrete, DDPM"),
        ("image_size: [511, 512]", "image_size must be"),
        ("eta: 0.5\nsample_method: DDPM", "eta is read only with sample_method=DDIM"),
        ("beta_start: 0.5\nbeta_end: 0.1", "beta_start and beta_end"),
        ("first_frame: [a.png]\nimage_size: [16, 32]", "cropped square"),
        ("first_frame: [a.png]\nvideo_length: 1", "leave nothing to sample"),
        ("window: 4\noverlap: 4", "from 1 to window - 1 = 3"),
    ):
        (tmp_path / "t2x.yaml").write_text(text)
        refuses(re.escape(words), load_t2x_config, tmp_path / "t2x.yaml", {})


def error_of(folder: Path, out: Path, *flags: str) -> tuple[str, str]:
    """The error of the command line, which exits with 2, and what it says before it."""
    code, said = call(sample_t2x.main, *words_of(folder, out), "--prompt", "a", *flags)
    *before, error = said.splitlines()
    assert code == 2 and error.startswith("error: ") and "Traceback" not in said
    return error, "\n".join(before)


BROKEN = [  # file, the error if it is missing, and if it is truncated
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
def test_a_broken_file_is_one_sentence(file: str, missing: str, cut: str, latte: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(latte, tmp_path / "latte"))
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    assert cut in error_of(folder, tmp_path / "out")[0]
    (folder / file).unlink()
    assert missing in error_of(folder, tmp_path / "out")[0]


MISTAKES = [  # flags, error
    (["--revision", "v1"], "is a local folder, which has no revision v1: omit the revision"),
    (["--num_sampling_steps", "1001"], "num_sampling_steps=1001 is more than the 1000 steps of the noise"),
    (["--pretrained_model_path", "./absent"], "there is no folder"),
    (["--pretrained_model_path", "no_such_owner/no-such-model"], "could not be downloaded from the hub"),
    (["--quantize_text_encoder", "bnb4"], "bitsandbytes, which needs CUDA; use int8 on cpu"),
    (["--lora", "."], "is not a LoRA in peft's format"),
    (["--first_frame", "none.png", "--video_length", "4"], "first_frame: none.png: is not a readable image"),
    (["--save_img_path", "/dev/null/x"], "save_img_path /dev/null/x cannot be written"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES)
def test_mistakes_are_found_before_anything_is_loaded(
    flags: list[str], words: str, latte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=OSError("no network")))
    error, before = error_of(latte, tmp_path / "out", *flags)
    assert words in error and "loading" not in before


def test_parts_that_are_missing_or_do_not_fit(latte: Path, tmp_path: Path) -> None:
    for part in ("tokenizer", "text_encoder", "transformer", "scheduler", "vae"):
        folder = tmp_path / f"no {part}"
        folder.mkdir()
        for each in latte.iterdir():
            if each.name != part:
                (folder / each.name).symlink_to(each)
        refuses(f"has no sub-folder {part}, ", open_folder, tiny(folder))
    theirs(in_channels=3, out_channels=6).save_pretrained(tmp_path / "network")
    other = ["--prompt", "a", "--transformer", str(tmp_path / "network")]
    refuses("takes 4 latent channels, but the network predicts 3", command, latte, tmp_path / "out", *other)
    refuses("there is no prompt", command, latte, tmp_path)
    folder = Path(shutil.copytree(latte, tmp_path / "latte"))
    described = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**described, "d_ff": 64}))
    sentence = r"missing or have another shape than in its config\.json"
    refuses(sentence, TextEncoder.from_folder, folder, torch.float32, CPU)
