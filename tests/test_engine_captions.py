"""Training on captions: what the network is given, dropout, exact resumes, validation, previews, joint training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

import train
import train_with_img
from engine.checkpoint import load_checkpoint
from engine.conditions import EMPTY, Captions, EncodedFeatures, TextFeatures
from engine.config import load_config
from models.config_t2v import LATTE_1
from tests.conftest import random_weights, refuses
from tests.fault_support import assert_same, logged, make, newest
from tests.test_engine_trainer import check_extra_terms
from tests.text_support import CAPTIONS, TINY_TEXT, draw_captioned, save_text_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_captioned(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def tiny_text(captioned: Path, encoder: Path, tmp_path: Path) -> list[str]:
    return [*TINY_TEXT, f"data.path={captioned}", f"text.path={encoder}", f"train.output_dir={tmp_path / 'run'}"]


def test_features_are_the_encoders_and_padding_is_masked(tiny_text: list[str], encoder: Path) -> None:
    """Against transformers' own call without any padding."""
    config = load_config(None, tiny_text)
    texts = sorted(set(CAPTIONS.values()))
    captions = Captions(config.text, texts, EncodedFeatures(config.text, CPU), CPU)
    labels = torch.tensor([[0, 2], [3, 1]])
    batch = captions.batch(labels)
    features, mask = batch.features, batch.mask
    assert mask is not None
    tokenizer = T5Tokenizer.from_pretrained(encoder / "tokenizer")
    network = T5EncoderModel.from_pretrained(encoder / "text_encoder").eval()
    for place, number in [((0, 0), 0), ((0, 1), 2), ((1, 0), 3), ((1, 1), 1)]:
        ids = tokenizer(texts[number], return_tensors="pt").input_ids
        with torch.no_grad():
            expected = network(ids)[0][0]
        assert mask[place].tolist() == [1.0] * len(expected) + [0.0] * (24 - len(expected))
        torch.testing.assert_close(features[place][: len(expected)], expected, atol=1e-5, rtol=1e-5)
    padded = tokenizer([EMPTY], padding="max_length", max_length=24, return_tensors="pt")
    guided = batch.join(batch.null())
    with torch.no_grad():
        empty = network(padded.input_ids, attention_mask=padded.attention_mask)[0][0]
    assert torch.equal(guided.features[:2], features) and guided.mask is not None
    torch.testing.assert_close(guided.features[2:], empty.expand(2, 2, -1, -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(guided.mask[2:], guided.mask[:2])  # as many words as the captions that they stand in for


class Spy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, features: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor]:
        self.calls.append((features, mask))
        return (torch.cat([x, x], dim=1),)


def test_a_dropped_caption_is_the_empty_one(tiny_text: list[str]) -> None:
    """The share is that of the configuration, and what is dropped is a function of the position alone."""
    run = make([*tiny_text, "data.num_images=1", "text.caption_dropout=0.5"])
    captions = run.objective.conditions
    dropped, video = [], torch.zeros(40, 5, 3, 8, 8)
    labels = torch.tensor([[index % 5, (index + 2) % 5] for index in range(40)])
    for first in (0, 0, 40):
        spy, positions = Spy(), torch.arange(first, first + 40)
        run.objective(spy, {"video": video, "labels": labels, "position": positions})
        (features, mask) = spy.calls[0]
        batch = captions.batch(labels)
        assert isinstance(batch, TextFeatures) and batch.mask is not None
        empty = (features == batch.null_features).all(-1).all(-1)  # (40, 2)
        assert torch.equal(features[~empty], batch.features[~empty]) and torch.equal(mask, batch.mask)
        dropped.append(empty)
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], dropped[2])
    assert 0.35 < torch.cat(dropped[1:]).float().mean() < 0.65


def test_a_term_on_hidden_states(tiny_text: list[str]) -> None:
    check_extra_terms(tiny_text)


def test_training_resumes_exactly(tiny_text: list[str], tmp_path: Path) -> None:
    for name, steps in (("whole", 4), ("run", 2), ("run", 4)):
        keys = ["data.num_images=1", f"train.max_steps={steps}", f"train.output_dir={tmp_path / name}"]
        assert train_with_img.main([*tiny_text, *keys]) == 0
    assert_same(*(load_checkpoint(newest(tmp_path / name)).groups for name in ("whole", "run")))
    assert logged(tmp_path / "whole") == logged(tmp_path / "run")


def test_validation_and_previews(tiny_text: list[str], tmp_path: Path, captioned: Path) -> None:
    held_out = draw_captioned(tmp_path / "held_out")
    lines = (held_out / "captions.csv").read_text().replace("a kite", "an eagle")
    (held_out / "captions.csv").write_text(lines)
    monitor = [f"data.val_path={held_out}", "monitor.val_every=1", "monitor.val_buckets=2", "monitor.sample_every=1"]
    sample = ["sample.steps=2", "sample.labels=[a lamp falls]", "monitor.sample_videos=1", "sample.guidance_scale=2"]
    assert train.main([*tiny_text, *monitor, *sample, "train.max_steps=1"]) == 0
    assert len(logged(tmp_path / "run", "val")) == 2
    assert (tmp_path / "run" / "previews" / "step-0000001" / "ema.png").is_file()


def test_captions_condition_the_network(tiny_text: list[str]) -> None:
    batch = {"video": torch.randn(2, 4, 3, 8, 8).clamp(-1, 1), "position": torch.arange(2)}

    def loss(length: int, labels: list[list[int]]) -> float:
        run = make([*tiny_text, f"text.max_length={length}", "text.caption_dropout=0"])
        run.state.model.load_state_dict(random_weights(run.config, 0))
        return float(run.objective(run.state.model, {**batch, "labels": torch.tensor(labels)}).loss)

    assert loss(24, [[0], [1]]) == pytest.approx(loss(40, [[0], [1]]), rel=1e-6)
    assert abs(loss(24, [[0], [1]]) - loss(24, [[2], [3]])) > 1e-4


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["text.caption_channels=7"], "text.caption_channels is 7, but the features of"),
        (["text.path=null"], "text.path is not set"),
        (["text.path=no/such/folder"], "text.path: there is no folder"),
        (["data.name=folder"], "is trained on captions"),
        (["model.num_classes=3"], "model.num_classes=3 has no meaning with model.name=custom-t2v"),
        (["model.variant=parallel"], "model.variant=parallel has no meaning"),
        (["model.name=custom"], "has captions, which model.name=custom does not read"),
        (["model.name=custom-t2i"], "set data.num_frames=1"),
        (["train.temporal_ramp_steps=5"], "name that with train.init_from"),
        (["text.caption_dropout=1"], "text.caption_dropout"),
        (["text.revision=main", "text.path=null"], "text.revision"),
        (["text.dtype=half"], "text.dtype"),
        (["text.max_length=0"], "text.max_length must be at least 1 and at most 4,096, got 0"),
        (["text.max_length=100000"], "text.max_length must be at least 1 and at most 4,096, got 100000"),
        (["data.labels=none"], "captions replace labels"),
        (["codec.latent_channels=4", "codec.path=null"], "codec.latent_channels"),
        (["sample.guidance_scale=3", "text.caption_dropout=0"], "text.caption_dropout"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_text: list[str], overrides: list[str], sentence: str) -> None:
    refuses(sentence, make, [*tiny_text, *overrides])


def test_latte_1_is_the_published_network() -> None:
    config = load_config(None, ["model.name=Latte-1", "data.name=captions", "data.image_size=256"])
    assert config.text_network() == LATTE_1
    with pytest.raises(ValueError, match=r"codec.latent_channels=16"):
        load_config(None, ["codec.latent_channels=16"], base=config.to_dict()).text_network()
