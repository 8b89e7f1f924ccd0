"""Linear maps in 8 and 4 bits: near the full result, and smaller; bitsandbytes runs on a CPU too, if slowly."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from models.latte_t2v import LatteT2V
from models.quantize import QUANTIZERS, check_device, quantize
from tests.t2v_support import CONFIG, inputs, randomize

WIDE: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128}
BOUNDS = {"int8": 0.02, "bnb8": 0.02, "bnb4": 0.3}  # of the output's norm
SHARES = {"int8": 0.27, "bnb8": 0.27, "bnb4": 0.16}  # of the bytes of blocks in fp32


def text_network() -> LatteT2V:
    return randomize(LatteT2V.from_config({**CONFIG, **WIDE}), std=0.08)  # type: ignore[return-value]


def text_encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    kind = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}  # as T5 v1.1, which Latte's is
    return T5EncoderModel(T5Config(vocab_size=64, **sizes, **kind)).eval()


def bytes_of(value: Tensor) -> int:
    if hasattr(value, "__tensor_flatten__"):  # torchao's
        return sum(bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    own = value.numel() * value.element_size()
    state = getattr(value, "quant_state", None)  # of NF4
    return own + (state.absmax.numel() * state.absmax.element_size() if state is not None else 0)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", torch.float32), ("bnb8", torch.bfloat16), ("bnb4", torch.float16)], ids=str
)
@torch.no_grad()
def test_the_network_computes_nearly_the_same_from_fewer_bytes(kind: str, dtype: torch.dtype) -> None:
    model = text_network()
    expected = model(**inputs()).sample
    full = sum(bytes_of(each) for each in model.transformer_blocks[0].attn1.parameters() if each.ndim == 2)
    quantize(model.to(dtype), kind, torch.device("cpu"))
    found = model(**inputs(dtype=dtype)).sample
    assert found.dtype == model.dtype == dtype
    assert 0 < relative(found, expected) < BOUNDS[kind]
    weights = [each for name, each in model.transformer_blocks[0].attn1.named_parameters() if name.endswith("weight")]
    assert sum(bytes_of(each) for each in weights) < SHARES[kind] * full
    assert model.proj_out.weight.dtype == dtype, "the ends stay as they are"


@pytest.mark.parametrize("kind", QUANTIZERS)
@torch.no_grad()
def test_the_text_encoder_too(kind: str) -> None:
    """In fp16, where T5's last maps stay in fp32: their values outgrow it."""
    network, words = text_encoder(), torch.arange(3, 20)[None]
    network.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(3e4)
    expected = network(words)[0]
    network.half()
    for block in network.encoder.block:  # as transformers loads it
        block.layer[1].DenseReluDense.wo.float()
    found = quantize(network, kind, torch.device("cpu"))(words)[0]
    assert found.isfinite().all()
    assert relative(found, expected) < BOUNDS[kind]
    held = network.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert type(held) is nn.Parameter and held.dtype == torch.float32 if kind != "int8" else bytes_of(held) < 9000


def test_without_cuda_bitsandbytes_is_refused() -> None:
    for kind in ("bnb8", "bnb4"):
        with pytest.raises(ValueError, match=f"transformer={kind} is from bitsandbytes, which needs CUDA; use int8 on"):
            check_device(kind, torch.device("cpu"), "quantize_transformer")
        check_device(kind, torch.device("cuda", 0), "quantize_transformer")
    check_device("int8", torch.device("cpu"), "quantize_transformer")
    check_device(None, torch.device("cpu"), "quantize_transformer")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", QUANTIZERS)
@torch.no_grad()
def test_on_a_gpu(kind: str) -> None:
    device = torch.device("cuda")
    expected = text_network()(**inputs()).sample
    given = {key: value.to(device) for key, value in inputs(dtype=torch.float16).items()}
    model = quantize(text_network().half(), kind, device)
    assert relative(model(**given).sample.cpu(), expected) < BOUNDS[kind]
    assert {each.device.type for each in model.parameters()} == {"cuda"}
