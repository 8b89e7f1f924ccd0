"""`torch.compile` of the blocks: one graph for each kind, the same numbers, no trace of it in a checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from engine.weights import load_model_weights
from models import Latte
from models.blocks import LAYER_PLANS
from tests.fault_support import make
from tests.latte_support import tiny_latte

BATCH, FRAMES, CHANNELS, SIDE, CLASSES = 2, 4, 2, 4, 3
OPTIONS = {
    **{variant: {"variant": variant} for variant in LAYER_PLANS},
    "tokens": {"injection": "tokens"},
    "rope": {"variant": "sequential", "temporal_position": "rope"},
    "checkpointing": {"gradient_checkpointing": True},
}


def network(**options: object) -> Latte:
    return tiny_latte(SIDE, **options).double().train()


def gradients(model: nn.Module, images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, FRAMES + images, CHANNELS, SIDE, SIDE, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH, 1 + images), generator=generator)
    out = model(x, torch.tensor([3.0, 700.0], dtype=torch.float64), labels, num_images=images)
    model.zero_grad(set_to_none=True)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("option", OPTIONS)
def test_one_graph_for_each_kind_of_layer_and_no_break(option: str, images: int) -> None:
    """However many layers there are: blocks of one kind share a graph. `fullgraph` refuses breaks."""
    model = network(**OPTIONS[option])
    names, expected = list(model.state_dict()), gradients(model, images)
    compiler = CompileCounter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=compiler)
    torch.testing.assert_close(gradients(model, images), expected, rtol=1e-12, atol=1e-14)
    assert compiler.frame_count == len({str(block.branches) for block in model.blocks})
    assert list(model.state_dict()) == names


def test_graphs_under_autocast_are_whole_too() -> None:
    model = network().float()
    x = torch.randn(BATCH, FRAMES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    outputs = []
    for compiled in (False, True):
        for block in model.blocks if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(x, torch.tensor([3.0, 700.0]), torch.tensor([0, 1])).float())
        outputs[-1].sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.02, atol=0.02)


def test_ranks_exchange_the_gradients_of_compiled_blocks() -> None:
    """DistributedDataParallel around them, in a group of one: its hooks fire, and the gradients are the same."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        expected = gradients(model, 0)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(gradients(DistributedDataParallel(model), 0), expected, rtol=1e-12, atol=1e-14)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_training_is_the_same(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options))
    common = [*tiny, "data.num_images=2", "train.grad_accum_steps=2", "model.gradient_checkpointing=true"]

    def weights(name: str, *extra: str) -> dict[str, Tensor]:
        trainer = make([*common, f"train.output_dir={tmp_path / name}", *extra])
        trainer.fit()
        return trainer.state.model.state_dict()

    plain = weights("plain", "train.max_steps=4")
    weights("compiled", "train.max_steps=2", "train.compile=true")
    compiled = weights("compiled", "train.max_steps=4", "train.compile=true")
    assert compiled.keys() == plain.keys()
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)
    saved = load_model_weights(tmp_path / "compiled")
    assert saved.keys() == plain.keys()  # no `_orig_mod.`
