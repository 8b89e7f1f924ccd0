"""The host queues one step after the other: nothing in a step waits for the device, and reading late changes nothing.

There is no GPU here, so a step runs on the `meta` device: whatever would wait for the device (`.item()`, `bool()`, a
boolean index) is an error there, and every copy between host and device is seen. With a GPU, CUDA itself is asked.
"""

import contextlib
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.optim.optimizer as optimizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import objective
from engine.distributed import World
from engine.errors import TrainingAborted
from engine.guard import InFlight
from engine.optim import clip_gradients
from engine.run import collect_on_request
from engine.trainer import Trainer
from tests.fault_support import armed, logged, make, rows, run, same_tensors
from tests.latent_support import cache, save_codec

META = torch.device("meta")
QUIET = ["train.log_every=100", "train.max_steps=100"]  # steps that are due nothing


class Crossings(TorchDispatchMode):
    """Records all that crosses from host to device or back: (from, to, how many numbers); refuses what waits.

    A `first` step may wait: the optimiser and the sampler make their state.
    """

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.seen: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        if function is torch.ops.aten._to_copy.default:
            source, target = arguments[0], torch.device(keywords.get("device") or arguments[0].device)
            if source.device.type != target.type:
                assert keywords.get("non_blocking") or self.first, f"a copy of {tuple(source.shape)} to {target} waits"
                self.seen.append((source.device.type, target.type, source.numel()))
                if target.type == "cpu":
                    return torch.zeros(source.shape, dtype=source.dtype)  # "all is well"
        else:
            assert len({tensor.device for tensor in tensors}) < 2, f"{function} of host and device"
        return function(*arguments, **keywords)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for what torch lacks on `meta`: generators, autocast, and a name in the list of fused AdamW."""
    monkeypatch.setattr(objective, "sample_generator", lambda seed, position, device: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[InFlight]:
    """The steps whose outcome the host has read."""
    found: list[InFlight] = []
    outcome = InFlight.outcome
    monkeypatch.setattr(InFlight, "outcome", lambda self: (found.append(self), outcome(self))[1])
    return found


KINDS = {
    "plain": [],
    "accumulation": ["train.grad_accum_steps=2", "train.batch_size=1", "optim.clip_start_step=5"],
    "loss_aware": ["diffusion.timestep_sampler=loss_aware", "optim.spike_factor=3", "optim.spike_policy=clip"],
    "images": ["data.num_images=2", "model.label_dropout=0.3", "model.gradient_checkpointing=true"],
    "rope": ["model.variant=parallel", "model.temporal_position=rope", "train.precision=bf16"],
    "tubelets": ["model.variant=sequential", "model.patch_embedding=tubelet", "diffusion.loss=rescaled_kl"],
    "flow": ["diffusion.prediction=flow", "model.learn_sigma=false", "diffusion.timestep_density=logit_normal"],
    "tokens": ["model.injection=tokens", "model.variant=late_fusion", "diffusion.prediction=velocity"],
    "given": ["condition.frames=random", "condition.max_frames=2"],
    "latents": ["data.latents="],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits(tiny: list[str], tmp_path: Path, on_meta: None, read: list[InFlight], kind: str) -> None:
    """A step's clips and labels go to the device, its five numbers come back, and are read one step later."""
    extra = KINDS[kind]
    if kind == "latents":
        tiny = [*tiny, *save_codec(tmp_path / "codec", "AutoencoderKL")]
        extra = [f"data.latents={cache(tiny, tmp_path / 'cache')}"]
    run = make([*tiny, *QUIET, "optim.fused=true", *extra], World(device=META))
    run.parallel_model = run.state.model
    batches = run.run.batches(0)
    with Crossings(first=True):
        run.launch_step(next(batches))
    for _ in range(3):
        micro_batches, flight, before = next(batches), run.in_flight, len(read)
        with Crossings() as crossings:
            run.launch_step(micro_batches)
        assert read[before:] == [flight]  # of the step before, and no other
        clips = "latents" if kind == "latents" else "video"
        sent = [batch[key].numel() for batch in micro_batches for key in ("labels", clips)]
        assert crossings.seen == [*(("cpu", "meta", numel) for numel in sent), ("meta", "cpu", 5)]
    assert (run.state.step, run.state.samples_seen, run.state.guard.skipped) == (3, 6, 0)


def test_a_step_that_is_due_something_is_counted_at_once(tiny: list[str], on_meta: None, read: list[InFlight]) -> None:
    run = make([*tiny, "train.log_every=3", "train.max_steps=5", "optim.fused=true"], World(device=META))
    batches, counted = run.run.batches(0), []
    for _ in range(5):
        with Crossings():
            run.launch_step(next(batches))
        counted.append(run.state.step)
    assert counted == [0, 1, 3, 3, 5]


@pytest.mark.parametrize(
    ("fault", "extra"),
    [
        ("nan@0:3,spike@0:22", ["optim.schedule=cosine", "train.ema_warmup=true", "optim.clip_start_step=6"]),
        ("inf@0:5,nan@0:11", ["train.grad_accum_steps=2", "train.batch_size=1", "optim.fused=true"]),
        ("spike@0:22", ["optim.spike_policy=clip", "optim.max_grad_norm=1e9", "diffusion.timestep_sampler=loss_aware"]),
    ],
    ids=["schedules", "fused", "clipped"],
)
def test_reading_late_changes_nothing(tiny: list[str], tmp_path: Path, fault: str, extra: list[str]) -> None:
    early, late = (finished([*tiny, *extra], tmp_path / ahead, fault, ahead) for ahead in ("false", "true"))
    assert_same_end(early, late)


def finished(overrides: list[str], folder: Path, fault: str, ahead: str) -> tuple[Trainer, list[dict[str, Any]]]:
    common = ["train.log_every=8", "train.max_steps=25", "optim.warmup_steps=4", "train.checkpoint_every=9"]
    common.append("optim.spike_factor=10")
    with armed(fault):
        done = run([*overrides, *common, f"train.run_ahead={ahead}", f"train.output_dir={folder}"])
    assert done.state.guard.skipped + done.state.guard.spikes and done.state.step == 25
    skips = [row for row in rows(folder, "events.jsonl") if row["event"] == "skip"]
    assert len(skips) == done.state.guard.skipped and all(len(row["files"]) == 2 for row in skips)
    return done, logged(folder) + skips


def assert_same_end(one: tuple[Trainer, list[dict[str, Any]]], other: tuple[Trainer, list[dict[str, Any]]]) -> None:
    assert [{**row, "time": None} for row in one[1]] == [{**row, "time": None} for row in other[1]]
    first, second = one[0].state_dict(), other[0].state_dict()
    assert (first.state, first.samples_seen) == (second.state, second.samples_seen)
    assert all(same_tensors(group, second.groups[name]) for name, group in first.groups.items())


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, positions: set[int]) -> None:
    """NaN gradients of the steps that hold samples at those positions."""
    honest = Trainer._backward

    def spoiled(self: Trainer, micro_batches: list[dict[str, Tensor]]) -> Any:
        parts, losses = honest(self, micro_batches)
        if positions & {position for batch in micro_batches for position in batch["position"].tolist()}:
            parts["grad_norm"] = parts["grad_norm"] * torch.nan
            for parameter in self.state.model.parameters():
                parameter.grad.mul_(torch.nan)
        return parts, losses

    monkeypatch.setattr(Trainer, "_backward", spoiled)


def test_steps_skipped_in_a_row(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradients(monkeypatch, {10, 12, 14})
    extra = ["optim.schedule=cosine", "train.ema_warmup=true", "optim.fused=true"]
    early, late = (finished([*tiny, *extra], tmp_path / ahead, "", ahead) for ahead in ("false", "true"))
    assert late[0].state.guard.skipped == 3
    assert_same_end(early, late)
    with pytest.raises(TrainingAborted, match="2 steps in a row"):
        finished([*tiny, "optim.max_skips=2"], tmp_path / "aborted", "", "true")


def test_a_signal_is_answered_one_step_later(tiny: list[str], tmp_path: Path) -> None:
    for ahead, step in ((True, 5), (False, 4)):
        options = [*tiny, *QUIET, f"train.run_ahead={ahead}", f"train.output_dir={tmp_path / str(ahead)}"]
        with armed("term@0:3"):
            stopped = run(options)
        assert (stopped.state.step, stopped.state.samples_seen, stopped.in_flight) == (step, 2 * step, None)
        assert (tmp_path / str(ahead) / "PREEMPTED").exists()


def test_fused_is_the_plain_optimiser(tiny: list[str], tmp_path: Path) -> None:
    """float64: one kernel rounds otherwise than eight."""
    common = [*tiny, "train.precision=fp64", "train.max_steps=6", "optim.weight_decay=0.1"]
    weights = []
    for fused in ("true", "false"):
        with armed("nan@0:2"):
            made = run([*common, f"optim.fused={fused}", f"train.output_dir={tmp_path / fused}"])
        assert made.state.guard.skipped == 1
        weights.append(made.state.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("limit", [0.1, 3.0, 1e6, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_on_the_device_is_torchs(limit: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 3), (7,), ())]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ours = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.get_total_norm(ours)
    clip_gradients(ours, norm, torch.tensor(limit, dtype=torch.float64))
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    for one, parameter in zip(ours, parameters, strict=True):
        assert torch.equal(one, parameter.grad)


def test_steps_leave_no_garbage(tiny: list[str], request: pytest.FixtureRequest) -> None:
    """So that collecting it at rows of the log only holds nothing on the device."""
    for undo in (gc.enable, gc.unfreeze, gc.garbage.clear, lambda: gc.set_debug(0)):
        request.addfinalizer(undo)
    run = make([*tiny, *QUIET])
    batches = run.run.batches(0)
    for _ in range(2):
        run.launch_step(next(batches))
    with collect_on_request():
        assert not gc.isenabled()
        for _ in range(5):
            run.launch_step(next(batches))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [each for each in gc.garbage if isinstance(each, Tensor)]
        assert len(gc.garbage) < 50, gc.garbage[:5]
    assert gc.isenabled() and not gc.get_freeze_count()


def test_a_run_collects_when_it_logs(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it starts, with the collector still on; and at its two rows of the log."""
    enabled: list[bool] = []
    monkeypatch.setattr("engine.run.gc.collect", lambda: enabled.append(gc.isenabled()))
    run([*tiny, "train.max_steps=4", "train.log_every=2"])
    assert enabled == [True, False, False] and gc.isenabled() and not gc.get_freeze_count()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "latents"])
def test_cuda_sees_no_synchronisation(tiny: list[str], kind: str) -> None:
    device = torch.device("cuda", 0)
    run = make([*tiny, *QUIET, *KINDS[kind]], World(device=device))
    run.parallel_model = run.state.model
    batches = run.run.batches(0)
    for _ in range(3):
        run.launch_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.launch_step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.settle() == 0 and run.state.step == 6
