"""Weights of the text network: from and to diffusers, the official files, and PixArt-alpha as a start."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LattePipeline, LatteTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.config_t2v import LATTE_1
from models.convert_t2v import _pixart_config, convert_t2v, load_t2v, save_t2v, to_diffusers
from tests.conftest import refuses
from tests.t2v_support import CONFIG, IMAGE, inputs, ours_of, pixart, theirs, tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@torch.no_grad()
def same_output(first: nn.Module, second: nn.Module, bound: float = 1e-5, **options: Any) -> bool:
    given = inputs(**options)
    expected = second(**given).sample
    assert expected.std() > 0.05, "an output that tells nothing"
    return bool((first(**given).sample - expected).abs().max() <= bound * expected.abs().max())


def test_a_pipeline_saved_by_diffusers(tmp_path: Path) -> None:
    """Read, put in its place (the recipe of docs/latte_diffusers.md), and saved again."""
    network = theirs()
    tiny_pipeline(network).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / WEIGHTS):
        model, report = convert_t2v(source)
        assert same_output(model, network)
        assert sorted(report.taken) == sorted(network.state_dict())
        assert not report.left_theirs and not report.left_ours and not model.training
    pipeline = LattePipeline.from_pretrained(tmp_path, transformer=None)
    pipeline.register_modules(transformer=load_t2v(tmp_path))
    pipeline.register_modules(transformer=to_diffusers(pipeline.transformer))
    pipeline.save_pretrained(tmp_path / "again")
    assert same_output(LattePipeline.from_pretrained(tmp_path / "again").transformer, network)


def test_ours_in_diffusers_and_back(tmp_path: Path) -> None:
    model = ours_of(theirs(activation_fn="geglu", attention_bias=False, num_layers=3))
    assert save_t2v(model, tmp_path / "a" / "folder") == tmp_path / "a" / "folder"
    network, report = LatteTransformer3DModel.from_pretrained(tmp_path / "a" / "folder", output_loading_info=True)
    assert not any(report.values())
    assert same_output(network.eval(), model)
    assert same_output(load_t2v(tmp_path / "a" / "folder"), model)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["folder"]
    network = to_diffusers(model)
    assert isinstance(network, LatteTransformer3DModel) and same_output(network, model)
    assert network.proj_out.weight.data_ptr() == model.proj_out.weight.data_ptr()


@pytest.mark.parametrize(
    "options",
    [
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "20KB"},
        {"max_shard_size": "20KB"},
    ],
    ids=str,
)
def test_shards_and_other_names_of_the_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    network = theirs()
    network.save_pretrained(tmp_path, **options)
    assert same_output(load_t2v(tmp_path, variant=options.get("variant")), network)
    if options == {"max_shard_size": "20KB"}:
        next(tmp_path.glob("*-00002-*")).unlink()
        refuses("00002", load_t2v, tmp_path)


def test_half_precision_is_kept_or_widened(tmp_path: Path) -> None:
    theirs().bfloat16().save_pretrained(tmp_path)
    assert load_t2v(tmp_path, dtype=None).dtype == torch.bfloat16
    model = load_t2v(tmp_path)
    assert model.dtype == torch.float32
    assert same_output(model, LatteTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float32).eval())
    save_t2v(model.bfloat16(), tmp_path / "ours")
    assert {value.dtype for value in load_file(tmp_path / "ours" / WEIGHTS).values()} == {torch.bfloat16}


def test_official_files(tmp_path: Path) -> None:
    """EMA first, prefixes of wrappers, and what older versions of the code kept next to the weights."""
    network = theirs()
    old = {
        "caption_projection.y_embedding": torch.ones(120, 12),
        "temp_pos_embed": torch.ones(1, 4, 16),
        "pos_embed.pos_embed": torch.ones(1, 16, 16),
    }
    wrapped = {f"module.{key}": value for key, value in (network.state_dict() | old).items()}
    torch.save({"ema": wrapped, "model": theirs(seed=1).state_dict()}, tmp_path / "t2v.pt")
    for config in (CONFIG, {**CONFIG, "_class_name": "LatteT2V", "norm_num_groups": 32, "attention_type": "default"}):
        model, report = convert_t2v(tmp_path / "t2v.pt", config=config)
        assert same_output(model, network)
        assert set(report.left_theirs) == set(old)
        assert "ours is computed" in report.left_theirs["temp_pos_embed"]
    assert same_output(load_t2v(tmp_path / "t2v.pt", config=CONFIG, prefer="model"), theirs(seed=1))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert same_output(load_t2v(tmp_path / "t2v.pt"), network)


def originally_named(network: nn.Module) -> dict[str, Tensor]:
    """diffusers' weights of PixArt under the names of its authors, with what else is in their files."""
    theirs, merged = network.state_dict(), {}
    for key, value in theirs.items():
        key = re.sub(r"^transformer_blocks", "blocks", key)
        for new, old in (
            ("adaln_single.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("adaln_single.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("adaln_single.linear", "t_block.1"),
            ("pos_embed.proj", "x_embedder.proj"),
            ("caption_projection.linear_", "y_embedder.y_proj.fc"),
            ("proj_out", "final_layer.linear"),
            ("attn1.to_out.0", "attn.proj"),
            ("attn2.to_out.0", "cross_attn.proj"),
            ("attn2.to_q", "cross_attn.q_linear"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
        ):
            key = key.replace(new, old)
        merged["final_layer.scale_shift_table" if key == "scale_shift_table" else key] = value
    for block in range(IMAGE["num_layers"]):
        for kind in ("weight", "bias"):
            for name, parts in (("attn1.to_{}", "qkv"), ("attn2.to_{}", "kv")):
                keys = [f"blocks.{block}.{name.format(part)}.{kind}" for part in parts]
                fused = "attn.qkv" if parts == "qkv" else "cross_attn.kv_linear"
                merged[f"blocks.{block}.{fused}.{kind}"] = torch.cat([merged.pop(key) for key in keys])
    side = IMAGE["sample_size"] // 2
    return merged | {"pos_embed": torch.ones(1, side**2, 16), "y_embedder.y_embedding": torch.ones(120, 12)}


@torch.no_grad()
def frames_equal_images(model: nn.Module, network: nn.Module, masked: bool = False) -> bool:
    given = inputs(frames=6)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]) if masked else None
    size = torch.ones(2, 2)
    found = model(**given, encoder_attention_mask=mask).sample
    for frame, video in zip(given["hidden_states"].unbind(2), found.unbind(2)):
        expected = network(
            frame,
            encoder_hidden_states=given["encoder_hidden_states"],
            timestep=given["timestep"],
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": size, "aspect_ratio": size[:, :1]},
        ).sample
        assert expected.std() > 0.05
        if (video - expected).abs().max() > 1e-5 * expected.abs().max():
            return False
    return True


@pytest.mark.parametrize(("naming", "masked"), [("diffusers", True), ("old class name", False), ("original", True)])
def test_pixart_as_a_start_computes_its_images(tmp_path: Path, naming: str, masked: bool) -> None:
    network = pixart()
    if naming == "original":
        torch.save({"state_dict": originally_named(network)}, tmp_path / "PixArt-XL-2-256x256.pth")
        (tmp_path / "config.json").write_text(json.dumps(IMAGE))
        source = tmp_path / "PixArt-XL-2-256x256.pth"
    else:
        source = tmp_path / "transformer"
        network.save_pretrained(source)
    if naming == "old class name":
        config = json.loads((source / "config.json").read_text())
        config |= {"_class_name": "Transformer2DModel", "norm_num_groups": 32, "num_vector_embeds": None}
        (source / "config.json").write_text(json.dumps(config))
    model, report = convert_t2v(source)
    assert model.temporal_position_scale == 0.0
    assert frames_equal_images(model, network, masked)
    assert sorted(report.taken) == sorted(network.state_dict())
    assert all(key.startswith("temporal_transformer_blocks.") for key in report.left_ours)
    assert "temporal_transformer_blocks.{0-1}.attn1.to_q.weight: an image network has no frames" in str(report)
    assert set(report.left_theirs) == ({"pos_embed", "y_embedder.y_embedding"} if naming == "original" else set())


def test_temporal_blocks_of_a_start_learn(tmp_path: Path) -> None:
    """Zero outputs, but nothing else: the first step reaches them, the second what is before them."""
    pixart().save_pretrained(tmp_path)
    model = load_t2v(tmp_path).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs()).sample.square().mean().backward()
        optimizer.step()
    for name, parameter in model.temporal_transformer_blocks.named_parameters():
        assert parameter.grad.any() or name.endswith("to_k.bias"), name


def test_image_size_conditions_are_left(tmp_path: Path) -> None:
    """PixArt at 1024 pixels takes the size of its images as a condition; Latte does not, and the report says so."""
    network = pixart(attention_head_dim=12, cross_attention_dim=24, use_additional_conditions=True)
    network.save_pretrained(tmp_path)
    model, report = convert_t2v(tmp_path)
    assert len(report.left_theirs) == 8
    assert all("size and shape" in reason for reason in report.left_theirs.values())
    assert not frames_equal_images(model, network)
    for layer in (network.adaln_single.emb.resolution_embedder, network.adaln_single.emb.aspect_ratio_embedder):
        nn.init.zeros_(layer.linear_2.weight)
        nn.init.zeros_(layer.linear_2.bias)
    assert frames_equal_images(model, network)


def test_a_start_is_saved_with_its_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = pixart()
    network.save_pretrained(tmp_path / "pixart")
    model = load_t2v(tmp_path / "pixart", video_length=6)
    model.temporal_position_scale = 0.25
    save_t2v(model, tmp_path / "ours")
    assert "temporal_position_scale is 0.25, but diffusers ignores it and uses 1" in caplog.text
    again = load_t2v(tmp_path / "ours")
    assert again.temporal_position_scale == 0.25
    assert same_output(again, model)
    assert load_t2v(tmp_path / "ours", temporal_position_scale=1.0).temporal_position_scale == 1.0


def test_pixarts_own_file_without_a_config_is_of_the_size_of_its_table() -> None:
    assert _pixart_config(torch.empty(1, 256, 1152)).sample_size == 32
    assert _pixart_config(torch.empty(1, 1024, 1152)) == LATTE_1
    assert _pixart_config(None) == LATTE_1


def test_files_of_another_network(tmp_path: Path) -> None:
    save_file(theirs().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"read as Latte-1 because there is no config\.json next to it, does not fit"):
        load_t2v(tmp_path / "weights.safetensors")
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(3, 1), "temp_embed": torch.ones(1)}, tmp_path / "ffs.pt")
    refuses("is not a text-conditioned network", load_t2v, tmp_path / "ffs.pt")


def test_folders_that_hold_no_network(tmp_path: Path) -> None:
    refuses("there is no folder or file", load_t2v, tmp_path / "absent")
    refuses("neither transformer/config", load_t2v, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "_class_name": "UNet2DConditionModel"}))
    refuses("holds no weights", load_t2v, tmp_path)
    save_file(theirs().state_dict(), tmp_path / WEIGHTS)
    refuses("a UNet2DConditionModel network", load_t2v, tmp_path)
    for broken in ("{", "[1]", ""):
        (tmp_path / "config.json").write_text(broken)
        refuses(r"config.json .*copy it again", load_t2v, tmp_path)


def test_an_index_that_points_elsewhere(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    for name in ("../outside.safetensors", "/etc/passwd", 3):
        content["weight_map"]["proj_out.bias"] = name
        index.write_text(json.dumps(content))
        refuses("not an index of weight files in its folder", load_t2v, tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "mine.txt"):
        refuses("not an empty folder", save_t2v, ours_of(theirs()), target)
