"""Estimates the memory of sampling, for `tools.plan --sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.build import build_model, forward_inputs
from engine.config import Config
from models.autoencoder import DTYPES

SD_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
T5_PARAMETERS, T5_FP32_PARAMETERS = 4.762e9, 24 * 4096 * 10240  # T5-XXL's encoder; `wo`, which stay in fp32


def plan_sampling(config: Config) -> dict[str, float]:
    """Returns the bytes of sampling with the `sample` section, by part, and the totals with and without offloading.

    T5-XXL, for text networks, and Stable Diffusion's decoder are assumed. A step and decoding are the most that their
    tensors occupy at a time when they run on tensors without data.
    """
    from diffusers import AutoencoderKL  # slow to import

    sample, data, is_text = config.sample, config.data, config.model.is_text
    dtype = DTYPES[sample.precision]
    stored = dtype if is_text or sample.cast_weights else torch.float32
    clips = 1 if is_text else sample.batch_size  # text networks sample one video at a time
    frames = min(config.codec.chunk_size, clips * data.num_frames)
    model = build_model(config, "meta").to(stored)
    with torch.device("meta"):
        vae = AutoencoderKL(**SD_AUTOENCODER)
    torch.nn.Module.to(vae, DTYPES[sample.precision if is_text else config.codec.dtype])  # its own `to` warns
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = forward_inputs(config, clips * (2 if sample.guidance_scale > 1 else 1), "cpu", images=False)
        floats = ("x", "hidden_states", "encoder_hidden_states")
        inputs |= {key: inputs[key].to(stored) for key in floats if key in inputs}
        with torch.autocast("cpu", dtype, enabled=stored != dtype):
            network, step = find_peak(model.to_empty(device="cpu"), lambda: model(**inputs))
        latents = torch.zeros(frames, 4, data.image_size // 8, data.image_size // 8, dtype=vae.dtype)
        decoder, decoding = find_peak(vae.to_empty(device="cpu"), lambda: vae.decode(latents))
    encoder = is_text * (T5_PARAMETERS * dtype.itemsize + (dtype == torch.float16) * 2 * T5_FP32_PARAMETERS)
    return {
        "text encoder (freed before the rest)": encoder,
        "network": network,
        "one step": step,
        "autoencoder": decoder,
        "decoding": decoding,
        "at most": max(encoder, network + decoder + max(step, decoding)),
        "at most, with cpu_offload": max(encoder, network + step, decoder + decoding),
    }


def find_peak(model: torch.nn.Module, call: Callable[[], Any]) -> tuple[float, float]:
    """Returns the bytes of the weights of `model`, and the most that tensors made by `call` occupy at a time."""
    from torch.distributed._tools.mem_tracker import MemTracker  # slow to import

    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        call()
    peak = sum(each["Total"] for each in tracker.get_tracker_snapshot("peak").values())
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    return weights, peak - weights
