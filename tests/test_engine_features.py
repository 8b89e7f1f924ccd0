"""Alignment with an image encoder's features: the cache, the term, and the projector that no export holds."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, silu
from transformers import Dinov2Model

from datasets import build_dataset
from engine.alignment import open_features
from engine.build import build_model
from engine.config import load_config
from engine.weights import export_weights, load_model_weights
from models.vision_encoder import VisionEncoder
from tests.conftest import refuses
from tests.fault_support import make, newest, run
from tests.latent_support import cache, features, save_image_encoder

JOINT = ["data.num_images=1", "data.horizontal_flip=true"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_image_encoder(tmp_path_factory.mktemp("encoder") / "dinov2")


def encode(encoder: Path, video: Tensor) -> Tensor:
    """Features of (T, 3, 8, 8) for 4 x 4 tokens: the means of 4 x 4 patches of an image of 224 x 224."""
    images = (interpolate(video, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1) + 1) / 2
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    images = (images - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        patches = Dinov2Model.from_pretrained(encoder)(images).last_hidden_state[:, 1:]
    return patches.reshape(-1, 4, 4, 4, 4, 12).mean((2, 4)).reshape(-1, 16, 12)  # (T, row, in row, column, ...)


def test_a_batch_has_the_features_of_its_frames(tiny: list[str], encoder: Path, tmp_path: Path) -> None:
    """With latents from their cache; windows, mirroring and images as from the files."""
    tiny = [*tiny, *JOINT]
    made = features(tiny, encoder, tmp_path / "features")
    config = load_config(None, [*tiny, *made, f"data.latents={cache(tiny, tmp_path / 'latents')}"])
    clips, pixels = build_dataset(config.data, seed=5), build_dataset(load_config(None, tiny).data, seed=5)
    clips.features = open_features(config, clips)
    for place in ((0, 0), (0, 3), (1, 2), (2, 5)):
        expected, found = encode(encoder, pixels[place]["video"]), clips[place]["features"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert min((found - other).abs().max() for other in (expected.roll(1, 0), expected.flip(1))) > 0.1


def project(weights: dict[str, Tensor], tokens: Tensor, method: str) -> Tensor:
    """The projection of tokens (B, F, 16, D), by matrix products."""
    if method == "repa":
        for layer in (0, 2, 4):
            tokens = silu(tokens) if layer else tokens
            tokens = tokens @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
        return tokens
    grid = torch.zeros(*tokens.shape[:2], 6, 6, tokens.shape[-1], dtype=tokens.dtype)
    grid[:, :, 1:5, 1:5] = tokens.unflatten(2, (4, 4))
    kernel = weights["layers.0.weight"]
    parts = [grid[:, :, y : y + 4, x : x + 4] @ kernel[:, :, y, x].T for y in range(3) for x in range(3)]
    return (torch.stack(parts).sum(0) + weights["layers.0.bias"]).flatten(2, 3)


@pytest.mark.parametrize(("method", "embedding"), [("repa", "tubelet"), ("irepa", "uniform")])
def test_the_term_is_minus_the_cosine_of_projection_and_features(
    tiny: list[str], encoder: Path, tmp_path: Path, method: str, embedding: str
) -> None:
    tiny = [*tiny, *JOINT, "train.precision=fp64", f"model.patch_embedding={embedding}"]
    tiny += features(tiny, encoder, tmp_path / "made", "fp16")
    keys = ["features_block=1", f"features_method={method}", "features_weight=0.25", "features_until=7"]
    trainer = make([*tiny, *(f"objective.{key}" for key in keys)])
    (batch,) = next(trainer.batches())
    objective, model, states = trainer.objective, trainer.state.model, list[Tensor]()
    model.blocks[1].register_forward_hook(lambda *call: states.append(call[2]))
    found = objective(model, batch, 6)
    a, b = project(trainer.state.extra["projector"].state_dict(), states[0], method), batch["features"].double()
    if embedding == "tubelet":
        b = torch.stack([(b[:, 0] + b[:, 1]) / 2, (b[:, 2] + b[:, 3]) / 2, b[:, 4]], 1)
    if method == "irepa":
        centred = b - b.sum(2, keepdim=True) / 16
        b = centred / ((centred**2).sum(2, keepdim=True) / 15).sqrt()
    cosine = (a * b).sum(-1) / ((a**2).sum(-1) * (b**2).sum(-1)).sqrt()
    torch.testing.assert_close(found.parts["features"], -0.25 * cosine.mean(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.loss, found.parts["loss"] + found.parts["features"])
    assert "features" not in objective(model, batch, 7).parts


def test_an_export_has_no_projector(tiny: list[str], encoder: Path, tmp_path: Path) -> None:
    overrides = [*tiny, *features(tiny, encoder, tmp_path / "made"), "objective.features_block=1", "train.max_steps=2"]
    initial, trained = make(overrides).state.extra, run(overrides).state.extra
    assert not any(map(torch.equal, initial.parameters(), trained.parameters()))
    for weights in ("ema", "raw"):
        exported = export_weights(newest(tmp_path / "run"), tmp_path / weights, weights)
        build_model(load_config(None, tiny)).load_state_dict(load_model_weights(exported, weights))  # strict


def test_a_cache_or_setting_that_does_not_fit_is_refused(tiny: list[str], encoder: Path, tmp_path: Path) -> None:
    made = features(tiny, encoder, tmp_path / "made")
    for override, sentence in {
        "objective.features_block=2": r"objective\.features_block=2: the network has only blocks 0 to 1",
        "objective.route_blocks=[0,1]": r"features_block=0 lies inside objective\.route_blocks=\[0, 1\]",
        "train.parallel=fsdp": r"objective\.features trains a projector, which is not sharded",
        "model.patch_size=4": r"made has 16 features per frame, but the network 4 tokens",
    }.items():
        refuses(sentence, make, [*tiny, *made, override])
    other = save_image_encoder(tmp_path / "other", seed=1)
    refuses(r"made holds another cache \(encoder: ", features, tiny, other, tmp_path / "made")
    (other / "preprocessor_config.json").unlink()
    refuses(r"preprocessor_config\.json is missing", features, tiny, other, tmp_path / "new")


def test_an_encoder_without_means_is_one_sentence(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    refuses("needs image_mean and image_std of three channels", VisionEncoder, str(folder), 4, torch.device("cpu"))
