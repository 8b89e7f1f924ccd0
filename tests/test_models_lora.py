"""Adapters: against peft's own loading and merging, on our networks and on diffusers'; and trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.build import build_model
from engine.config import load_config
from engine.distributed import World
from engine.trainer import Trainer
from engine.weights import export_adapter, export_weights, load_model_weights
from models.convert_t2v import save_t2v, to_diffusers
from models.latte import Latte
from models.lora import Adapter, LoraConfig, add_lora, lora_weights, merge_lora, save_lora
from sample.generate import Generator
from tests.conftest import refuses
from tests.latte_support import tiny_latte
from tests.t2v_support import inputs, ours_of, randomize, theirs
from tests.text_support import TINY_TEXT, draw_captioned, save_text_encoder


def latte(**changes: Any) -> Latte:
    return tiny_latte(8, channels=4, depth=2, **changes)


def out(model: nn.Module) -> Tensor:
    if isinstance(model, Latte):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 4, 8, 8, generator=generator)
        return model(x, torch.tensor([10.0, 700.0]), torch.tensor([0, 2])).detach()
    return model(**inputs()).sample.detach()


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    add_lora(model, config)
    generator = torch.Generator().manual_seed(3)
    for value in lora_weights(model.state_dict()).values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize(
    ("kind", "targets"), [("latte", "attention+mlp"), ("parallel", "attention"), ("text", "attention+mlp")]
)
def test_adapters_start_as_the_identity_and_merge_into_the_weights(kind: str, targets: str, tmp_path: Path) -> None:
    make = {"latte": latte, "parallel": lambda: latte(variant="parallel"), "text": lambda: ours_of(theirs())}[kind]
    plain, config = out(make()), LoraConfig(rank=3, alpha=6.0, targets=targets)
    fresh = make()
    add_lora(fresh, config)
    assert torch.equal(out(fresh), plain)
    assert all((".lora_" in name) == each.requires_grad for name, each in fresh.named_parameters())
    model = adapted(make(), config)
    expected = out(model)
    assert (expected - plain).abs().max() > 0.1, "adapters that do nothing"
    folder = save_lora(lora_weights(model.state_dict()), config, tmp_path / "lora")
    merged = make()
    merge_lora(merged, folder)
    assert (out(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    merge_lora(merged, folder, scale=-1.0)
    assert (out(merged) - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"attn2.to_q": 5}}], ids=str)
def test_adapters_of_peft_merge_as_peft_does(changes: dict[str, Any], tmp_path: Path) -> None:
    wanted = PeftConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v", "to_out.0"], **changes)
    network = get_peft_model(to_diffusers(ours_of(theirs())), wanted)
    for value in lora_weights(network.state_dict()).values():
        nn.init.normal_(value, std=0.3)
    network.save_pretrained(tmp_path)
    model = ours_of(theirs())
    merge_lora(model, tmp_path, scale=1.0)
    expected = out(network.merge_and_unload())
    assert (out(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def base(tiny: list[str], tmp_path: Path) -> Path:
    trainer = Trainer(load_config(None, [*tiny, f"train.output_dir={tmp_path / 'base'}"]), World())
    randomize(trainer.state.model, seed=2, std=0.1)
    trainer.state.ema.load_state_dict(trainer.state.model.state_dict())
    trainer.run.save(trainer.state)
    return tmp_path / "base"


def lora_run(tiny: list[str], base: Path, *overrides: str) -> Trainer:
    keys = [*tiny, "lora.rank=2", f"train.init_from={base}", "optim.learning_rate=0.01", *overrides]
    trainer = Trainer(load_config(None, keys), World())
    trainer.fit()
    return trainer


def test_only_adapters_are_trained_saved_and_averaged(tiny: list[str], base: Path, tmp_path: Path) -> None:
    trainer = lora_run(tiny, base, "train.max_steps=4", "train.ema_decay=0.5", "model.gradient_checkpointing=true")
    model, average = trainer.state.model.state_dict(), trainer.state.ema.state_dict()
    before = load_model_weights(base)
    for name, value in before.items():
        if f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}" not in model:
            assert torch.equal(model[name], value)
    changed = [name for name in lora_weights(model) if "lora_B" in name and model[name].any()]
    assert len(changed) == 4
    held = "blocks.0.attn.qkv.base_layer.weight"
    assert average[held].data_ptr() == model[held].data_ptr()
    assert not torch.equal(average[changed[0]], model[changed[0]])
    folder = tmp_path / "run" / "checkpoints" / "step-0000004"
    for file in ("model", "ema"):
        assert load_file(folder / f"{file}.safetensors").keys() == lora_weights(model).keys()
    moments = load_file(folder / "optim.safetensors")
    assert {key.partition("/")[2] for key in moments} == lora_weights(model).keys()


def test_a_run_with_adapters_continues_bit_for_bit(tiny: list[str], base: Path, tmp_path: Path) -> None:
    whole = lora_run(tiny, base, "train.max_steps=4", f"train.output_dir={tmp_path / 'whole'}")
    lora_run(tiny, base, "train.max_steps=2", f"train.output_dir={tmp_path / 'parts'}")
    continued = lora_run(tiny, base, "train.max_steps=4", f"train.output_dir={tmp_path / 'parts'}")
    for part in ("model", "ema"):
        expected, found = (getattr(run.state, part).state_dict() for run in (whole, continued))
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_the_first_loss_is_that_of_the_base_in_half_precision(tiny: list[str], base: Path, tmp_path: Path) -> None:
    losses = []
    for rank in (0, 2):
        target = f"train.output_dir={tmp_path / str(rank)}"
        trainer = lora_run(tiny, base, f"lora.rank={rank}", "train.max_steps=1", "train.precision=bf16", target)
        losses.append(json.loads((tmp_path / str(rank) / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == losses[1]
    assert trainer.state.model.blocks[0].attn.qkv.base_layer.weight.dtype == torch.bfloat16
    assert trainer.state.model.blocks[0].attn.qkv.lora_A["default"].weight.dtype == torch.float32


def test_sampling_and_exports_of_a_run_with_adapters(tiny: list[str], base: Path, tmp_path: Path) -> None:
    trainer = lora_run(tiny, base, "train.max_steps=3", "lora.alpha=4")
    run = tmp_path / "run"
    settings: dict[str, Any] = {"num": 2, "steps": 2, "seed": 5}
    video = Generator.from_checkpoint(run, weights="raw").sample(**settings)
    plain = Generator.from_checkpoint(base).sample(**settings)
    assert (video != plain).any()
    x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = (x, torch.tensor([3.0, 400.0]), torch.tensor([0, 1]))
    merged = Generator.from_checkpoint(run, weights="raw").model(*given)
    torch.testing.assert_close(merged, trainer.state.model(*given), rtol=1e-5, atol=1e-5)
    alone = export_weights(run, tmp_path / "alone", "raw")
    assert load_config(alone / "config.yaml").lora.rank == 0
    assert (Generator.from_checkpoint(alone, weights="raw").sample(**settings) == video).all()
    export_adapter(run, tmp_path / "adapter", "raw")
    for scale, expected in ((1.0, video), (0.0, plain)):
        keys = [f"sample.lora={tmp_path / 'adapter'}", f"sample.lora_scale={scale}"]
        config = load_config(base / "checkpoints" / "step-0000000" / "config.yaml", keys)
        assert (Generator.from_checkpoint(base, config=config).sample(**settings) == expected).all()


def test_a_text_network_is_tuned_and_its_adapters_fit_diffusers(tmp_path: Path) -> None:
    keys = [*TINY_TEXT, f"data.path={draw_captioned(tmp_path / 'clips')}", f"train.output_dir={tmp_path / 'run'}",
            f"text.path={save_text_encoder(tmp_path / 'text')}"]  # fmt: skip
    base = randomize(build_model(load_config(None, keys)), std=0.1)
    save_t2v(base, tmp_path / "base")  # type: ignore[arg-type]
    trainer = lora_run(keys, tmp_path / "base", "train.max_steps=2", "lora.targets=attention+mlp")
    assert all((".lora_" in name) == each.requires_grad for name, each in trainer.state.model.named_parameters())
    weights = load_model_weights(tmp_path / "run", "raw")
    changed = [name for name, value in base.state_dict().items() if not torch.equal(value, weights[name])]
    assert {".attn" in name for name in changed} == {False, True}
    assert all((".attn" in name or ".ff." in name) and name.endswith("weight") for name in changed)
    given = {"hidden_states": torch.randn(1, 3, 4, 8, 8), "timestep": torch.tensor([40]),
             "encoder_hidden_states": torch.randn(1, 5, 12)}  # fmt: skip
    expected = trainer.state.model(**given).sample.detach()
    folder = export_adapter(tmp_path / "run", tmp_path / "adapter", "raw")
    found = PeftModel.from_pretrained(to_diffusers(base), str(folder)).eval()(**given).sample  # type: ignore[arg-type]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_base_that_changed_is_refused(tiny: list[str], base: Path, tmp_path: Path) -> None:
    lora_run(tiny, base, "train.max_steps=1")
    save_file({key: value + 1 for key, value in load_model_weights(base).items()}, tmp_path / "other.safetensors")
    refuses("lora_base: ", lora_run, tiny, tmp_path / "other.safetensors", "train.max_steps=2")
    base.rename(tmp_path / "elsewhere")
    refuses(r"holds adapters on train.init_from=.*, which cannot be loaded", load_model_weights, tmp_path / "run")
    refuses("holds a whole network and no adapters", export_adapter, tmp_path / "elsewhere", tmp_path / "out")


def test_files_that_are_refused(tmp_path: Path) -> None:
    model = adapted(ours_of(theirs()), LoraConfig(rank=2))
    folder = save_lora(lora_weights(model.state_dict()), LoraConfig(rank=2), tmp_path / "lora")
    refuses(r"is for another network: this one has no ", merge_lora, latte(), folder)
    wide = theirs(num_attention_heads=4, cross_attention_dim=32)
    refuses(r"attn1.to_\w.* is \(16, 16\) there, \(32, 32\) here", merge_lora, ours_of(wide), folder)
    refuses("not a LoRA in peft's format: it has no adapter_config", Adapter.from_folder, tmp_path)
    file = folder / "adapter_config.json"
    for text, words in (
        ("{", "not valid JSON"),
        ('{"lora_alpha": "NaN"}', "alpha must be finite"),
        ('{"lora_alpha": 2, "use_dora": true}', "use_dora is True; only plain LoRA"),
    ):
        file.write_text(text)
        refuses(words, Adapter.from_folder, folder)
    file.write_text('{"lora_alpha": 2}')
    weights = load_file(folder / "adapter_model.safetensors")
    for lost in ({key: value for key, value in weights.items() if "0.attn1.to_q.lora_B" not in key}, {}):
        save_file(lost or {"a.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
        refuses(r"lacks A or B|it holds a\.weight", Adapter.from_folder, folder)
