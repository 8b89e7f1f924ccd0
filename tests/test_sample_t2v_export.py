"""Trained text networks outside the training: exported to diffusers, sampled by sample_t2x.py, inflated from images."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LattePipeline, PixArtTransformer2DModel, PyramidAttentionBroadcastConfig
from safetensors.torch import load_file, save_file

import train
from engine.build import build_model, build_process
from engine.checkpoint import load_checkpoint, step_folder
from engine.config import load_config
from engine.objective import sample_generator
from engine.trainer import Trainer
from models.autoencoder import CodecConfig, LatentCodec
from models.convert_t2v import load_t2v
from models.latte_t2v import LatteT2V
from models.lora import LoraConfig, add_lora, lora_weights, save_lora
from sample import sample_t2x
from sample.t2v_export import describe_scheduler, export_run
from sample.t2x_config import load_t2x_config
from sample.text_to_video import build_generator, open_run
from tests.conftest import random_weights, refuses, save_weights
from tests.fault_support import make, restore, same_tensors, seal
from tests.hub_stand_in import local_hub
from tests.latent_support import save_codec
from tests.text_support import TINY_TEXT, draw_captioned, save_text_encoder
from tools import convert

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {"video_length": 4, "height": 8, "width": 8, "clean_caption": False, "output_type": "pt"}
IMAGES = ["model.name=custom-t2i", "model.depth=1", "data.num_frames=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(root: Path) -> list[str]:
    codec = save_codec(root / "codec", "AutoencoderKL")
    clips, encoder = draw_captioned(root / "clips"), save_text_encoder(root / "encoder")
    return [*TINY_TEXT, *codec, f"data.path={clips}", f"text.path={encoder}", "sample.steps=3", "sample.method=ddim"]


def start(*overrides: str) -> Trainer:
    """Returns a trainer as it is before its first step."""
    trainer = make(list(overrides))
    restore(trainer)
    return trainer


def test_diffusers_pipeline_makes_the_same_video(base: list[str], tmp_path: Path) -> None:
    """All of it from the exported folder; ours by `--ckpt`. Guidance too."""
    predictions = ["model.learn_sigma=false", "diffusion.prediction=x_start", "sample.guidance_scale=3"]
    config = load_config(None, [*base, *predictions])
    source, folder = save_weights(config, tmp_path / "run"), tmp_path / "latte"
    assert export_run(source, folder) == []
    model, defaults = open_run(str(source))
    settings = load_t2x_config(None, {"text_prompt": ["a stone falls"]}, defaults)
    encoded = sample_t2x.encode_all(settings, model, settings.prompts(), CPU)
    generator = build_generator(settings, model, encoded, CPU)
    generator.decode = lambda _, latents: generator.codec.decode(latents).numpy()  # type: ignore[assignment]
    ours = torch.from_numpy(generator.sample([0], 1, **settings.settings()))
    noise = torch.randn(1, config.codec.latent_channels, 4, 4, 4, generator=sample_generator(0, 0, CPU))
    pipeline = LattePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    steps = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 3.0}
    theirs = pipeline("a stone falls", **steps, **SIZE).frames
    torch.testing.assert_close(ours / 2 + 0.5, theirs, atol=2e-4, rtol=0)


def test_diffusers_caches_work_on_an_exported_network(base: list[str], tmp_path: Path) -> None:
    """As docs/text_to_video.md writes it: fewer attentions, a near video, and the plain one when it is off again."""
    folder = tmp_path / "latte"
    export_run(save_weights(load_config(None, base), tmp_path / "run"), folder)
    pipe = LattePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    attentions: list[str] = []
    for name, module in pipe.transformer.named_modules():
        if name.endswith("to_out.0"):
            module.register_forward_hook(lambda *_, name=name: attentions.append(name))

    def sample() -> tuple[torch.Tensor, int]:
        attentions.clear()
        generator = torch.Generator().manual_seed(0)
        frames = pipe("a stone falls", num_inference_steps=8, guidance_scale=3.0, generator=generator, **SIZE).frames
        return frames, len(attentions)

    plain, computed = sample()
    steps = {"spatial": 2, "temporal": 4, "cross": 6}
    broadcast = PyramidAttentionBroadcastConfig(
        **{f"{kind}_attention_block_skip_range": skip for kind, skip in steps.items()},
        spatial_attention_block_identifiers=("^transformer_blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(broadcast)
    cached, _ = sample()
    kinds = ("temporal", "attn2", "^transformer_blocks.*attn1")
    counts = [sum(bool(re.search(kind, name)) for name in attentions) for kind in kinds]
    assert counts == [3, 3, 5] and computed == 3 * 8  # of 8 steps, 6 of them between timesteps 100 and 800
    assert 0 < (cached - plain).abs().mean() < 0.2 * plain.std()
    assert torch.equal(sample()[0], cached)  # the pipeline starts each video with an empty cache
    pipe.transformer.disable_cache()
    assert torch.equal(sample()[0], plain)


def test_a_network_without_a_variance_gets_one_of_zeros(base: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*base, "model.learn_sigma=false"])
    source = save_weights(config, tmp_path / "run")
    export_run(source, tmp_path / "latte")
    padded, plain = load_t2v(tmp_path / "latte"), open_run(str(source))[0].load_network(torch.float32)
    x, words, t = torch.randn(2, 5, 4, 4, 4), torch.randn(2, 6, 12), torch.tensor([3, 900])
    with torch.no_grad():
        mean, variance = padded(x, t, words, return_dict=False)[0].chunk(2, dim=1)
        assert torch.equal(mean, plain(x, t, words, return_dict=False)[0])
    assert not variance.any()


@pytest.mark.parametrize(("schedule", "num_steps"), [("linear", 1000), ("cosine", 200)])
def test_the_scheduler_is_the_trainings(base: list[str], schedule: str, num_steps: int) -> None:
    sizes = [f"diffusion.num_steps={num_steps}", f"diffusion.schedule={schedule}"]
    config = load_config(None, [*base, *sizes, "diffusion.prediction=velocity"])
    described = describe_scheduler(config)
    theirs, ours = DDIMScheduler.from_config(described), build_process(config)
    x, noise, t = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4), torch.tensor([num_steps // 3, num_steps - 2])
    torch.testing.assert_close(ours.q_sample(x, t, noise), theirs.add_noise(x, noise, t), atol=1e-4, rtol=1e-4)
    assert described["prediction_type"] == "v_prediction"
    loss = ours.training_losses(lambda *_: torch.cat([theirs.get_velocity(x, noise, t)] * 2, dim=2), x, t, noise)
    assert float(loss.mse.max()) < 1e-6


def test_H3_a_run_that_is_not_finite_is_named(base: list[str], tmp_path: Path) -> None:
    source = save_weights(load_config(None, base), tmp_path / "run" / "checkpoints")
    weights = load_file(source / "ema.safetensors")
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, source / "ema.safetensors")
    seal(source)
    command = ["--ckpt", str(tmp_path / "run"), "--prompt", "a stone", "--save_img_path", str(tmp_path / "out")]
    refuses(f"{source / 'ema.safetensors'}: proj_out.bias holds NaN or infinity", sample_t2x.main, command)


def test_a_run_is_sampled_by_its_name(base: list[str], tmp_path: Path) -> None:
    source = save_weights(load_config(None, base), tmp_path / "run" / "checkpoints")
    out = ["--save_img_path", str(tmp_path / "out")]
    assert sample_t2x.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a stone falls", *out]) == 0
    told = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert told["sample"]["image_size"] == [8, 8]
    assert told["videos"][0]["file"] == "0000_a_stone_falls.mp4"
    first = (tmp_path / "out" / "0000_a_stone_falls.mp4").read_bytes()
    assert sample_t2x.main(["--ckpt", str(source), "--prompt", "a stone falls", "--sample_method", "DDPM", *out]) == 0
    assert (tmp_path / "out" / "0000_a_stone_falls.mp4").read_bytes() != first


def test_a_method_that_text_sampling_lacks_is_named(base: list[str], tmp_path: Path) -> None:
    """The run may preview with a solver of class-conditional sampling."""
    source = save_weights(load_config(None, [*base, "sample.method=unipc"]), tmp_path / "run")
    _, defaults = open_run(str(source))
    prompt = {"text_prompt": ["a stone falls"]}
    refuses(r"sample_method must be one of .*, got 'unipc'", load_t2x_config, None, prompt, defaults)
    assert load_t2x_config(None, {**prompt, "sample_method": "DDPM"}, defaults).sample_method == "DDPM"


def test_an_image_network_is_pixart(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, [*base, *IMAGES])
    source, folder = save_weights(config, tmp_path / "run"), tmp_path / "pixart"
    assert convert.main(["diffusers", str(source), str(folder), "--weights", "raw"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder} is written\nwithout scheduler, vae and text: ")
    theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "pixart" / "transformer").eval()
    ours = build_model(config).eval()
    ours.load_state_dict(random_weights(config, 0))
    x, words, t = torch.randn(2, 5, 4, 4), torch.randn(2, 6, 12), torch.tensor([3, 900])
    with torch.no_grad():
        expected = theirs(x, encoder_hidden_states=words, timestep=t, added_cond_kwargs={}).sample
        found = ours(x[:, :, None], t, words, return_dict=False)[0][:, :, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_an_image_network_is_inflated(base: list[str], tmp_path: Path, kind: str) -> None:
    """At the start every frame is the image network's; then positions in time are let in, step by step."""
    images = load_config(None, [*base, *IMAGES])
    source = save_weights(images, tmp_path / "images")
    if kind == "folder":
        export_run(source, tmp_path / "pixart")
        source = tmp_path / "pixart"
    model = start(*base, f"train.init_from={source}", "train.temporal_ramp_steps=4").state.model
    image_network = build_model(images).eval()
    image_network.load_state_dict(random_weights(images, 0))
    assert isinstance(model, LatteT2V)
    x, words, t = torch.randn(2, 5, 4, 4, 4), torch.randn(2, 6, 12), torch.tensor([3, 900])
    with torch.no_grad():
        video = model.eval()(x, t, words, return_dict=False)[0]
        frames = [image_network(x[:, :, n : n + 1], t, words, return_dict=False)[0] for n in range(4)]
    assert torch.equal(video, torch.cat(frames, dim=2))


def test_the_ramp_goes_on_where_it_was(base: list[str], tmp_path: Path) -> None:
    source = save_weights(load_config(None, [*base, *IMAGES]), tmp_path / "images")
    for name, stops in {"whole": [5], "broken": [2, 5]}.items():
        for steps in stops:
            run = [*base, f"train.init_from={source}", "train.temporal_ramp_steps=4", "optim.learning_rate=1e-2"]
            assert train.main([*run, f"train.output_dir={tmp_path / name}", f"train.max_steps={steps}"]) == 0
    first, second = (load_checkpoint(step_folder(tmp_path / name / "checkpoints", 5)) for name in ("whole", "broken"))
    assert same_tensors(first.model, second.model)
    export_run(step_folder(tmp_path / "broken" / "checkpoints", 2), tmp_path / "early")
    export_run(step_folder(tmp_path / "broken" / "checkpoints", 5), tmp_path / "late")
    assert load_t2v(tmp_path / "early").temporal_position_scale == 0.5
    assert load_t2v(tmp_path / "late").temporal_position_scale == 1.0


def test_a_video_network_is_a_start_too(base: list[str], tmp_path: Path) -> None:
    """Ours from a checkpoint or as diffusers' folder; with neither a ramp, nor another size."""
    config = load_config(None, base)
    source = save_weights(config, tmp_path / "run")
    export_run(source, tmp_path / "latte")
    for network in (source, tmp_path / "latte", tmp_path / "latte" / "transformer"):
        state = start(*base, f"train.init_from={network}").state
        assert same_tensors(state.model.state_dict(), random_weights(config, 0))
    for overrides, sentence in [
        (["train.temporal_ramp_steps=4"], "is for a video network that starts from an image network; train"),
        (["model.hidden_size=32"], "is another network: attention_head_dim 8 there and 16 here"),
    ]:
        refuses(sentence, start, *base, f"train.init_from={tmp_path / 'latte'}", *overrides)
    images = save_weights(load_config(None, [*base, *IMAGES]), tmp_path / "images")
    refuses("introduce them over a number of steps", start, *base, f"train.init_from={images}")


def test_a_hub_name_works_like_a_folder(base: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Encoder, codec, start, adapters and whole models by name and revision; each prints its commit."""
    config, out = load_config(None, base), tmp_path / "out"
    export_run(save_weights(config, tmp_path / "run"), tmp_path / "latte")
    network = build_model(config)
    add_lora(network, LoraConfig(rank=2))
    save_lora(lora_weights(network.state_dict()), LoraConfig(rank=2), tmp_path / "lora")
    keys = [*(each for each in base if not each.startswith("text.path")), "text.path=me/mine"]
    size = ["--image_size", "16", "16", "--video_length", "1", "--num_sampling_steps", "2", "--precision", "fp32"]
    commits: dict[tuple[str, str], str] = {}
    with local_hub(tmp_path / "home") as hub:
        for name, folder, revision in (("mine", "latte", "v1"), ("mine", "latte", "main"),
                                       ("lora", "lora", "v2"), ("lora", "lora", "main")):  # fmt: skip
            commits[name, revision] = hub.add_folder(f"me/{name}", tmp_path / folder, revision)
        for changes in (["text.revision=v1", "train.init_from=me/mine@v1"], ["train.init_from=me/mine", "lora.rank=2"]):
            start(*keys, *changes)
        codec = CodecConfig(path="me/mine", subfolder="vae", revision="v1", latent_channels=5, downsample_factor=2)
        assert LatentCodec.from_config(codec).network.config.latent_channels == 5
        names = ["--pretrained_model_path", "me/mine", "--transformer", "me/mine@v1", "--lora", "me/lora@v2"]
        told = ["--prompt", "a stone", "--save_img_path", str(out / "seen"), "--device", "cpu"]
        assert sample_t2x.main([*names, *told, *size]) == 0
        assert convert.main(["t2v", "me/mine", str(out / "merged"), "--lora", "me/lora", "--revision", "v1"]) == 0
        for name, more, reason in (("me/absent", [], "RepositoryNotFoundError"),
                                   ("me/mine", ["--revision", "v9"], "RevisionNotFoundError")):  # fmt: skip
            sentence = rf"source={name} is not a local folder and could not be downloaded from the hub \({reason}\)"
            refuses(sentence, convert.main, ["t2v", name, str(out / "none"), *more])
    assert len(set(commits.values())) == 4
    for (name, revision), commit in commits.items():
        assert f"me/{name}: revision {revision}, commit {commit}" in caplog.text
    assert list((out / "seen").glob("0000_*.png")) and (out / "merged" / "config.json").is_file()


def test_other_networks_are_refused(base: list[str], tiny: list[str], tmp_path: Path) -> None:
    classes = save_weights(load_config(None, tiny), tmp_path / "classes")
    flow = load_config(None, [*base, "diffusion.prediction=flow", "model.learn_sigma=false", "sample.method=euler"])
    flow_run = save_weights(flow, tmp_path / "flow")
    refuses("flow is not supported by LattePipeline", export_run, flow_run, tmp_path / "out")
    refuses("is not a text network", export_run, classes, tmp_path / "out")
    refuses("is not a text network", open_run, str(classes))
    assert not (tmp_path / "out").exists()
