"""The text-conditioned network against diffusers' class and pipeline, with random weights."""

import inspect
from dataclasses import MISSING, fields
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as functional
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from models.config_t2v import LATTE_1, LatteT2VConfig
from models.latte_t2v import LatteT2V
from tests.conftest import refuses
from tests.t2v_support import CONFIG, WORDS, inputs, ours_of, randomize, theirs, tiny_pipeline


@torch.no_grad()
def assert_equal(model: LatteT2V, network: nn.Module, bound: float = 1e-5, **arguments: Any) -> Tensor:
    """The same output of both, within `bound` of its largest value; returns it."""
    expected = network(**arguments).sample
    found = model(**arguments).sample
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert expected.std() > 0.05, "an output that tells nothing"
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    return found


def test_latte_1_on_the_meta_device_is_diffusers_network() -> None:
    keys = {key: value for key, value in LATTE_1.to_dict().items() if not key.startswith("_")}
    with torch.device("meta"):
        model, network = LatteT2V(LATTE_1), LatteTransformer3DModel(**keys)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == {key: tuple(value.shape) for key, value in network.state_dict().items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in network.parameters()) == 1_057_246_880
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}, "tables that no file could fill in"


def test_defaults_are_those_of_diffusers() -> None:
    signature = inspect.signature(LatteTransformer3DModel.__init__).parameters
    expected = {key: each.default for key, each in signature.items() if key != "self"}
    assert {field.name: field.default for field in fields(LatteT2VConfig) if field.default is not MISSING} == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False, "out_channels": None},
        {"norm_elementwise_affine": True, "norm_eps": 1e-3},
        {"activation_fn": "geglu", "patch_size": 4},
        {"activation_fn": "gelu", "dropout": 0.1},
        {"sample_size": 128, "patch_size": 16},
        *({"video_length": frames} for frames in (1, 8, 24)),
    ],
    ids=str,
)
def test_equals_diffusers(changes: dict[str, Any]) -> None:
    """diffusers' network takes the frame count that it was trained with and 1; ours, trained at 4, takes all."""
    size = (32, 16) if changes.get("patch_size") == 16 else (8, 8)
    given = {**inputs(size=size, frames=changes.get("video_length", 4)), "timestep": torch.tensor([0.25, 873.5])}
    assert_equal(ours_of(theirs(**{**changes, "video_length": 4})), theirs(**changes), **given)


@pytest.mark.parametrize("size", [(12, 6), (2, 2)], ids=str)
@pytest.mark.parametrize("temporal", [True, False], ids=["temporal", "frames alone"])
def test_equals_diffusers_at_other_sizes(size: tuple[int, int], temporal: bool) -> None:
    network = theirs()
    given = inputs(size=size)
    model = ours_of(network)
    first = assert_equal(model, network, enable_temporal_attentions=temporal, **given)
    (second,) = model(**given, enable_temporal_attentions=temporal, return_dict=False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_fp32_as_diffusers_is(dtype: torch.dtype) -> None:
    ratios = []
    for seed in range(4):
        network = theirs(seed=seed).to(dtype)
        given = inputs(dtype=dtype, seed=seed)
        widened = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
        exact = network.float()(**widened).sample
        errors = []
        for each in (ours_of(network).to(dtype), network.to(dtype)):
            sample = each(**given).sample
            assert sample.dtype == dtype
            errors.append((sample.float() - exact).square().mean().sqrt() / exact.std())
        assert errors[0] < 30 * torch.finfo(dtype).eps
        ratios.append(errors[0] / errors[1])
    assert torch.stack(ratios).mean() < 1.2


def test_gradients_equal_diffusers() -> None:
    network = theirs().double()
    model = ours_of(network)
    given = inputs(dtype=torch.float64)
    for each in (network, model):
        each(**given).sample.square().sum().backward()
    expected = dict(network.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-9)


def keep(*lengths: int) -> Tensor:
    """`(len(lengths), L)`: 1 for the first words of each caption."""
    return (torch.arange(WORDS) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(("lengths", "dtype"), [((5, 5), torch.int64), ((1, 4), torch.bool), ((2, 5), torch.float32)])
def test_a_masked_caption_is_the_caption_without_the_masked_words(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    network = theirs()
    model = ours_of(network)
    given = inputs()
    found = model(**given, encoder_attention_mask=keep(*lengths).to(dtype)).sample
    for index, length in enumerate(lengths):
        sample = {key: value[index : index + 1] for key, value in given.items()}
        sample["encoder_hidden_states"] = sample["encoder_hidden_states"][:, :length]
        expected = network(**sample).sample
        assert (found[index : index + 1] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_official_mask_is_a_bias_of_minus_10000_on_every_frame() -> None:
    """As the official code builds it from a mask, given to diffusers' blocks."""
    network = theirs()
    mask = keep(2, 4)
    bias = ((1 - mask) * -10_000.0).repeat_interleave(4, dim=0)[:, None]  # (B*F, 1, L)
    expected = network(**inputs(), encoder_attention_mask=bias).sample
    torch.testing.assert_close(ours_of(network)(**inputs(), encoder_attention_mask=mask).sample, expected)


def test_an_empty_caption_is_finite_and_a_full_mask_is_none() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = ours_of(theirs()).to(dtype)
        given = inputs(dtype=dtype)
        assert model(**given, encoder_attention_mask=keep(0, 3)).sample.isfinite().all()
        assert torch.equal(model(**given, encoder_attention_mask=keep(5, 5)).sample, model(**given).sample)


@pytest.mark.parametrize("kind", ["bool", "0/1", "bias"])
def test_masks_of_diffusers_are_taken_as_they_are(kind: str) -> None:
    network = theirs()
    model = ours_of(network, text_mask="diffusers")
    mask = keep(*range(1, 6), 2, 3, 4)  # other words for each frame, which only this reading can say
    mask = {"bool": mask.bool(), "0/1": mask.float(), "bias": (1 - mask) * -3.0}[kind]
    for shaped in (mask, mask[:, None]):
        found = assert_equal(model, network, encoder_attention_mask=shaped, **inputs())
        assert not torch.allclose(found, model(**inputs()).sample, atol=1e-3)
    refuses("one row per frame", model, **inputs(), encoder_attention_mask=torch.ones(2, WORDS))


def joint(images: int = 2) -> dict[str, Tensor]:
    return inputs(frames=4 + images, captions=1 + images)


@pytest.mark.parametrize("masked", [False, True], ids=["whole captions", "masked"])
def test_images_of_a_batch_are_computed_alone(masked: bool) -> None:
    network = theirs()
    given, lengths = joint(), ((2, 4, 3), (5, 1, 2))
    mask = torch.stack([keep(*each) for each in lengths]) if masked else None
    found = ours_of(network)(**given, encoder_attention_mask=mask, num_images=2).sample
    for sample in range(2):
        for part in range(3):
            frames = slice(0, 4) if part == 0 else slice(3 + part, 4 + part)
            words = lengths[sample][part] if masked else WORDS
            expected = network(
                given["hidden_states"][sample : sample + 1, :, frames],
                given["timestep"][sample : sample + 1],
                given["encoder_hidden_states"][sample : sample + 1, part, :words],
                enable_temporal_attentions=part == 0,
            ).sample
            torch.testing.assert_close(found[sample : sample + 1, :, frames], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_timestep_for_each_frame() -> None:
    """Without blocks over time a frame is computed as by itself; such blocks take no timestep of an image."""
    model, close = ours_of(theirs()).double(), {"rtol": 1e-10, "atol": 1e-10}
    given = inputs(frames=6, dtype=torch.float64, captions=3)
    x, captions = given["hidden_states"], given["encoder_hidden_states"]
    own = torch.tensor([[0, 9, 40, 999, 300, 300], [4, 600, 7, 0, 0, 0]])
    together = model(x, own, captions, num_images=2).sample
    torch.testing.assert_close(together[:, :, :4], model(x[:, :, :4], own[:, :4], captions[:, 0]).sample, **close)
    of_images = model(x, own[:, -1], captions, num_images=2).sample
    torch.testing.assert_close(together[:, :, 4:], of_images[:, :, 4:], **close)
    x, captions, once = x[:, :, :4], captions[:, 0], given["timestep"]
    each = model(x, once[:, None].expand(-1, 4), captions).sample
    torch.testing.assert_close(each, model(x, once, captions).sample, **close)
    apart = model(x, own[:, :4], captions, enable_temporal_attentions=False).sample
    for frame in range(4):
        alone = model(x[:, :, [frame]], own[:, frame], captions, enable_temporal_attentions=False).sample
        torch.testing.assert_close(apart[:, :, [frame]], alone, **close)


@torch.no_grad()
def test_hidden_states_are_the_outputs_of_the_blocks() -> None:
    model, seen = ours_of(theirs()), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, output: seen.append(output))
    output, hidden = model(**inputs(), return_hidden_states=(1, 2))
    assert sorted(hidden) == [1, 2] and all(torch.equal(tokens, seen[index]) for index, tokens in hidden.items())
    plain = model(**inputs())
    assert plain.hidden_states is None and torch.equal(output, plain.sample)
    assert hidden[1].shape[:2] == (output.shape[0], output.shape[2])
    as_tuple = model(**inputs(), return_dict=False, return_hidden_states=(1,))
    assert torch.equal(as_tuple[1][1], hidden[1])


def test_nothing_is_repeated_per_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = ours_of(theirs()), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, given, __, name=name: seen.update({name: tuple(given[0].shape)}))
    spy = Mock(wraps=functional.scaled_dot_product_attention)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    model(**inputs())
    assert seen["adaln_single.linear"] == (2, 16)
    assert seen["caption_projection.linear_1"] == (2, 1, WORDS, 12)
    assert seen["transformer_blocks.1.attn2.to_k"] == seen["transformer_blocks.1.attn2.to_v"] == (2, 1, WORDS, 16)
    assert seen["transformer_blocks.1.attn1.to_k"] == (2, 4, 16, 16)
    shapes = [(tuple(q.shape), tuple(k.shape)) for (q, k, _), _ in spy.call_args_list]
    space, text, time = ((8, 2, 16, 8),) * 2, ((2, 2, 64, 8), (2, 2, WORDS, 8)), ((2, 32, 4, 8),) * 2
    assert shapes == [space, text, time] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(dropout: float) -> None:
    gradients, calls = [], []
    for option in (False, True):
        model = randomize(LatteT2V.from_config({**CONFIG, "dropout": dropout}, gradient_checkpointing=option)).train()
        model.transformer_blocks[1].ff.register_forward_hook(lambda *_, option=option: calls.append(option))
        torch.manual_seed(0)
        model(**joint(), num_images=2).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert calls == [False, True, True], "the block was not recomputed"
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_blocks_compile_without_a_graph_break() -> None:
    network, images = theirs(num_layers=1), 2
    given = joint(images)
    given["encoder_attention_mask"] = torch.ones(given["encoder_hidden_states"].shape[:-1])
    model, expected = ours_of(network), ours_of(network)(**given, num_images=images).sample
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    found = model(**given, num_images=images).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()


def test_a_fresh_network_predicts_zero_and_ignores_captions() -> None:
    torch.manual_seed(0)
    model = LatteT2V.from_config(CONFIG)
    assert not model(**inputs()).sample.any()
    nn.init.normal_(model.proj_out.weight)
    given = inputs()
    before = model(**given).sample
    assert before.any()
    given["encoder_hidden_states"] += 1.0
    assert torch.equal(model(**given).sample, before)
    model(**given).sample.square().sum().backward()
    assert all(block.attn2.to_out[0].weight.grad.any() for block in model.transformer_blocks), "captions are learned"


def test_temporal_blocks_as_the_identity() -> None:
    model = ours_of(theirs())
    model.start_as_image_network()
    given = inputs()
    together = model(**given).sample
    torch.testing.assert_close(together, model(**given, enable_temporal_attentions=False).sample, rtol=0, atol=0)
    model.temporal_position_scale = 1.0
    assert not torch.allclose(model(**given).sample, together, atol=1e-3), "positions in time are not back"


@pytest.mark.parametrize(("temporal_vae", "frames"), [(False, 1), (True, 4)])
def test_the_pipeline_of_diffusers_gives_the_same_video(temporal_vae: bool, frames: int) -> None:
    network, videos = theirs(), []
    steps = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt", "clean_caption": False}
    for each in (network, ours_of(network)):
        pipeline, generator = tiny_pipeline(each, temporal=temporal_vae), torch.Generator().manual_seed(3)
        prompts = ["a", "a blue square moving"]
        videos.append(pipeline(prompts, video_length=frames, generator=generator, **steps).frames)
    assert videos[0].shape == (2, frames, 3, 16, 16) and videos[0].std() > 0.01
    torch.testing.assert_close(videos[1], videos[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "layer_norm"}, "norm_type must be one of ada_norm_single"),
        ({"patch_size": None}, "patch_size must be an integer"),
        ({"out_channels": 0}, "out_channels must be"),
        ({"cross_attention_dim": 32}, "cross_attention_dim must be 16"),
        ({"sample_size": 9}, "not divisible by patch_size"),
        ({"attention_head_dim": 3, "cross_attention_dim": 6}, "divisible by 4"),
        ({"num_layer": 2}, "num_layer is not a key .*; did you mean num_layers?"),
        ({"interpolation_scale": 2}, "interpolation_scale must be one of None, 1, got 2"),
        ({"text_mask": "keep"}, "text_mask must be one of official, diffusers"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(changes: dict[str, Any], words: str) -> None:
    options = {key: changes.pop(key) for key in list(changes) if key == "text_mask"}
    refuses(words, LatteT2V.from_config, {**CONFIG, **changes}, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_states": (2, 3, 4, 8, 8)}, r"latents must be of shape \(B, 4, F\+I, H, W\), got \(2, 3, 4, 8, 8\)"),
        ({"hidden_states": (2, 4, 4, 7, 8)}, "7 x 8 are not divisible into patches of 2 x 2"),
        ({"timestep": (1,)}, r"timestep must be of shape \(2,\)"),
        ({"encoder_hidden_states": (2, WORDS, 13)}, r"must be \(B, L, 12\) with B=2, got \(2, 5, 13\)"),
        ({"encoder_hidden_states": (2, WORDS, 12), "num_images": 1}, r"must be \(B, 2, L, 12\)"),
        ({"num_images": 4}, r"num_images must be in \[0, 4\) for 4 frames, got 4"),
        ({"encoder_attention_mask": (2, 4)}, r"encoder_attention_mask must be of shape \(2, 5\)"),
        ({"encoder_attention_mask": (8, 1, 5)}, "one row per caption"),
        ({"encoder_hidden_states": None}, "timestep and encoder_hidden_states .* must be given"),
        ({"return_hidden_states": [99]}, r"return_hidden_states must be block indices in \[0, 4\), got \(99,\)"),
    ],
    ids=str,
)
def test_inputs_that_are_refused(changes: dict[str, Any], words: str) -> None:
    shaped = {key: torch.ones(value) if isinstance(value, tuple) else value for key, value in changes.items()}
    refuses(words, lambda: ours_of(theirs())(**{**inputs(), **shaped}))
