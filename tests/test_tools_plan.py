"""tools.plan: its memory against measured peaks and closed forms, its time against arithmetic done by hand."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.build import build_model
from engine.config import Config, load_config
from models.blocks import compile_blocks
from tests.conftest import refuses
from tools import plan, plan_sampling

H100 = plan.GPUS["h100"]
SMALL = ["model.name=custom", "model.hidden_size=192", "model.depth=4", "model.num_heads=3", "model.patch_size=2"]
SMALL += ["data.num_frames=8", "data.image_size=128", "train.batch_size=2"]


def config_of(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def need(config: Config) -> plan.Need:
    return plan.estimate_need(config, H100, 1, 0.4)


def kept_bytes(model: Any, precision: str, compiled: bool = False) -> int:
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return value

    inputs = torch.randn(4, 8, 4, 16, 16), torch.zeros(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        if compiled:
            compile_blocks(model.blocks)
            model(*inputs)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            model(*inputs)
    return sum(each.nbytes() for each in storages.values())


def planned_bytes(config: Config) -> float:
    fixed, per_clip = plan.kept_for_backward(config)
    return fixed + 4 * per_clip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_planned_activations_are_those_of_a_real_forward(precision: str, checkpointing: str) -> None:
    config = config_of(f"train.precision={precision}", f"model.gradient_checkpointing={checkpointing}")
    assert planned_bytes(config) == pytest.approx(kept_bytes(build_model(config), precision), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_keep_at_most_what_is_planned(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's partitioner may find less to keep than inputs, products and attention; no more. No code is made."""
    plain = torch.nn.Module.compile
    backend = {"backend": "aot_eager_decomp_partition"}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain(self, **options, **backend))
    config = config_of(f"train.precision={precision}", "train.compile=true", "model.depth=2")
    torch._dynamo.reset()
    planned = planned_bytes(config)
    assert 0.85 * planned < kept_bytes(build_model(config), precision, compiled=True) <= planned
    assert planned < 0.65 * planned_bytes(load_config(None, ["train.compile=false"], base=config.to_dict()))


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_memory_is_what_torch_tracks(checkpointing: str) -> None:
    """torch's own tracker, which follows two steps with forward, backward and AdamW on tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    config = config_of(f"model.gradient_checkpointing={checkpointing}")
    with FakeTensorMode():
        model = build_model(config)
        optimizer, tracker = torch.optim.AdamW(model.parameters()), MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                model(torch.zeros(2, 8, 4, 16, 16), torch.zeros(2)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    peak = sum(each["Total"] for each in tracker.get_tracker_snapshot("peak").values())
    found = need(config)
    planned = found.memory - found.states["average (EMA)"]
    assert 0.97 * peak < planned < 1.2 * peak  # all gradients are there only when little else is kept


def test_states_are_twenty_bytes_a_parameter_and_shards_share_them() -> None:
    alone = need(config_of())
    assert sum(alone.states.values()) == 20 * alone.parameters
    sharded = plan.estimate_need(config_of("train.parallel=fsdp"), H100, 4, 0.4)
    assert sum(sharded.states.values()) == 5 * alone.parameters
    assert sharded.activations == alone.activations
    half = need(config_of("train.precision=bf16"))
    assert sum(half.states.values()) == 22 * alone.parameters


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is counted that is kept for the backward pass."""
    plan._count_network.cache_clear()
    monkeypatch.setattr(plan, "kept_for_backward", lambda config: (0.0, 1.0))
    yield
    plan._count_network.cache_clear()


def test_time_of_the_largest_network_is_arithmetic(no_memory: None) -> None:
    """11.177 TFLOP a clip; 40 % of 989 TFLOP/s; SD's encoder 4.36 TFLOP a clip."""
    config = load_config(None, ["train.precision=bf16", "train.batch_size=5", "codec.path=any"])
    found = need(config)
    assert found.flop == pytest.approx(5 * 11.177e12, rel=1e-3)
    assert found.compute_s == pytest.approx(5 * 11.177 / (0.4 * 989), rel=1e-3)
    assert found.encoding_s == pytest.approx(5 * 4.36 / (0.4 * 989), rel=1e-2)
    again = need(load_config(None, ["model.gradient_checkpointing=true"], base=config.to_dict()))
    assert again.compute_s == pytest.approx(4 / 3 * found.compute_s)
    images = need(load_config(None, ["data.num_images=8"], base=config.to_dict()))
    assert images.flop == pytest.approx(1.5 * found.flop)


def test_adapters_and_frozen_weights() -> None:
    """States of the adapters alone; the base in bf16, without gradients: two passes, three with checkpointing."""
    keys = ["train.precision=bf16", "train.init_from=a.pt", "lora.rank=4"]
    found, plain = need(config_of(*keys)), need(config_of(*keys[:1]))
    blocks, width = 4, 192
    assert found.parameters == blocks * 4 * (width + 3 * width + width + width)  # A and B of qkv and of proj
    assert found.states["frozen weights"] == 2 * plain.parameters
    assert sum(found.states.values()) == 22 * found.parameters + 2 * plain.parameters
    assert found.flop == pytest.approx(plain.flop * 2 / 3)
    assert found.activations < 1.1 * plain.activations
    again = need(config_of(*keys, "model.gradient_checkpointing=true"))
    assert again.compute_s == pytest.approx(1.5 * found.compute_s)


def test_exchange_is_a_ring() -> None:
    """8 bytes a parameter around DDP's ring; 8 around FSDP's, and 4 for each further micro-step."""
    speed = H100.link * 1e9
    ddp = plan.exchange_seconds(1000, H100, 4, sharded=False, accumulation=3)
    assert ddp == pytest.approx(8 * 1000 * 3 / 4 / speed)
    assert plan.exchange_seconds(1000, H100, 4, sharded=True, accumulation=1) == pytest.approx(ddp)
    assert plan.exchange_seconds(1000, H100, 4, sharded=True, accumulation=2) == pytest.approx(1.5 * ddp)
    across = plan.exchange_seconds(1000, H100, 16, sharded=False, accumulation=1)
    assert across == pytest.approx(8 * 1000 * 15 / 16 / (H100.network * 1e9))
    assert plan.exchange_seconds(1000, H100, 1, sharded=False, accumulation=1) == 0


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    gpu = H100._replace(memory=2.0)
    largest = plan.find_largest_batch(config_of(), gpu, 1, 0.4)
    assert 1 < largest < plan.LARGEST_BATCH
    tried = [config_of(f"train.batch_size={size}") for size in (largest, largest + 1)]
    assert [plan.estimate_need(each, gpu, 1, 0.4).fits for each in tried] == [True, False]


def test_a_config_that_does_not_fit_is_changed_until_it_does() -> None:
    config, gpu = config_of("train.batch_size=16"), plan.GPUS["rtx4090"]._replace(memory=0.4)
    assert not plan.estimate_need(config, gpu, 2, 0.4).fits
    overrides, needs = plan.find_change(config, gpu, 2, 0.4) or pytest.fail("nothing fits")
    changed = load_config(None, overrides, base=config.to_dict())
    assert needs.fits and plan.estimate_need(changed, gpu, 2, 0.4).memory == needs.memory
    assert changed.train.batch_size * changed.train.grad_accum_steps == 16
    assert plan.find_change(config, plan.Gpu(1, 1, 1, 0.01, 1, 1), 1, 0.4) is None


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SMALL, "train.batch_size=1026", "--gpu", "rtx4090", "--gpus", "4"]
    assert plan.main(command) == 0
    text = capsys.readouterr().out
    assert "2.8 M parameters, on 4 x rtx4090" in text and "DOES NOT FIT" in text and "better: " in text
    assert max(map(len, text.splitlines())) <= 100
    plan.main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["global_batch_size"] == 4 * 1026 and not found["needs"]["fits"]


def test_a_tiny_network_gets_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """The arithmetic of its step is no estimate of a run."""
    assert plan.main(["--config", "configs/folder/folder_train.yaml"]) == 0
    text = capsys.readouterr().out
    assert "clips per second" not in text and "1,500 steps take longer than" in text
    assert max(map(len, text.splitlines())) <= 80


def test_wrong_flags() -> None:
    refuses("--gpu h900 is unknown; one of h200", plan.main, ["--gpu", "h900"])
    refuses("--mfu above 0", plan.main, ["--mfu", "0"])
    refuses("--gpus must be at least 1", plan.main, ["--gpus", "0"])


def test_the_peak_is_the_most_alive_at_a_time() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call() -> None:
        first = torch.zeros(1000)
        second = first * 2
        del first
        torch.cat([second, second, second])

    with FakeTensorMode(), torch.no_grad():
        assert plan_sampling.find_peak(torch.nn.Linear(9, 10), call) == (400, 16000)


def test_sampling_needs_its_largest_part() -> None:
    from transformers import T5Config, T5EncoderModel

    tiny = [*SMALL, "data.image_size=32", "sample.batch_size=1", "model.num_classes=8"]
    one, two, half = (plan_sampling.plan_sampling(load_config(None, [*tiny, *more])) for more in (
        [], ["sample.guidance_scale=2"], ["sample.precision=bf16", "sample.cast_weights=true"]))  # fmt: skip
    parameters = sum(value.numel() for value in build_model(load_config(None, tiny), "meta").parameters())
    assert one["network"] == pytest.approx(4 * parameters, rel=0.02) and half["network"] == one["network"] / 2
    assert one["autoencoder"] == 4 * 83_653_863, "the parameters of Stable Diffusion's autoencoder"
    assert 1.5 < two["one step"] / one["one step"] < 2.1 and half["one step"] < 0.7 * one["one step"]
    assert one["text encoder (freed before the rest)"] == 0
    together = one["network"] + one["autoencoder"] + max(one["one step"], one["decoding"])
    assert one["at most"] == together > one["at most, with cpu_offload"]
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))
    outputs = [value for name, value in encoder.named_parameters() if name.endswith("wo.weight")]
    assert sum(value.numel() for value in encoder.parameters()) == pytest.approx(plan_sampling.T5_PARAMETERS, rel=1e-3)
    assert sum(value.numel() for value in outputs) == plan_sampling.T5_FP32_PARAMETERS
