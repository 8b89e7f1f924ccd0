"""Validation and previews during a training: they change nothing in it, stop in time, and lose no run."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pytest import MonkeyPatch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sample.preview
import train
from datasets import build_dataset
from engine import checkpoint as ckpt
from engine.callbacks import Observation
from engine.config import load_config
from engine.distributed import World
from engine.objective import Objective
from engine.run import Run
from engine.state import TrainState
from engine.trainer import Trainer
from engine.validation import Validation
from evaluation.distances import frechet_distance
from sample.generate import Generator
from tests import fault_support
from tests.conftest import TINY, refuses
from tests.detector_stubs import StubI3D, StubInception
from tests.fault_support import assert_same, logged, on_two_ranks, rows, same_tensors, state_of

WATCHED = [
    *("monitor.val_every=2", "monitor.val_buckets=3", "monitor.val_clips=5"),
    *("monitor.sample_every=3", "monitor.sample_videos=3", "sample.steps=3", "sample.batch_size=2"),
]
Ranks = tuple[Path, list[dict[str, Any]]]


def watched(tiny: list[str], *extra: str) -> list[str]:
    """The tiny run with everything that looks at it; validated on the clips that it is trained on."""
    path = next(each.partition("=")[2] for each in tiny if each.startswith("data.path="))
    return [*tiny, *WATCHED, f"data.val_path={path}", *extra]


def run(overrides: list[str], world: World | None = None) -> Trainer:
    return fault_support.run(overrides, world, callbacks=train.callbacks(load_config(None, overrides)))


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted((folder / "previews").rglob("*.*"))}


@pytest.mark.parametrize(
    "extra",
    [
        ["data.num_images=2", "train.grad_accum_steps=2", "train.batch_size=1"],
        ["diffusion.prediction=flow", "model.learn_sigma=false", "train.precision=bf16", "model.num_classes=0"],
    ],
    ids=["joint", "flow"],
)
def test_the_training_is_the_same_bit_for_bit(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    """Weights, average, moments, generators, losses; and no gradient is left where there was none."""
    common = [*extra, "train.max_steps=4", "model.label_dropout=0.5"]
    common += ["model.gradient_checkpointing=true", "train.async_checkpoint=true"]
    common += ["diffusion.timestep_sampler=loss_aware"] if "data.num_images=2" in extra else []
    plain = run([*tiny, *common, f"train.output_dir={tmp_path / 'plain'}"])
    seen = run(watched(tiny, *common, f"train.output_dir={tmp_path / 'seen'}"))
    assert_same(state_of(seen), state_of(plain))
    assert same_tensors(seen.state_dict().rng, plain.state_dict().rng)
    assert logged(tmp_path / "seen", "train") == logged(tmp_path / "plain", "train")
    assert [row["step"] for row in logged(tmp_path / "seen", "preview")] == [0, 3, 4]
    assert seen.state.model.training == plain.state.model.training
    assert all(parameter.requires_grad for parameter in seen.state.model.parameters())
    assert all(parameter.grad is None for parameter in seen.state.ema.model.parameters())


def measured(detector: Path) -> list[str]:
    keys = ["metric_every=3", "metric_videos=4", "metric_detector=inception", f"metric_detector_path={detector}"]
    return [f"monitor.{key}" for key in keys]


def inception() -> StubInception:
    torch.manual_seed(0)
    return StubInception()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("detector") / "inception.pt"
    torch.jit.script(inception()).save(file)
    return file


def two_ranks(world: World, tiny: list[str], folder: str, weights: str, metric: list[str]) -> dict[str, Any]:
    """All that two ranks do in these tests, in one start of them: what each training ended with."""
    found: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        common = [*tiny, "train.max_steps=3", "train.batch_size=1", f"train.parallel={kind}"]
        common += [f"train.init_from={weights}"]
        for name, overrides in (("plain", common), ("seen", watched(common, *metric))):
            place = f"{kind}-{name}"
            with MonkeyPatch.context() as patch:
                if (world.rank, kind) == (1, "ddp"):  # the decoder of its previews runs out of memory
                    patch.setattr(Generator, "decode", no_memory)
                found[place] = state_of(run([*overrides, f"train.output_dir={folder}/{place}"], world))
    with signalled_within_validation(world.rank == 1, call=4):
        trainer = run(watched(tiny, "train.max_steps=9", f"train.output_dir={folder}/signal"), world)
    return {**found, "signal": trainer.state.step}


@pytest.fixture(scope="module")
def ranks(frame_folders: Path, tmp_path_factory: pytest.TempPathFactory, detector: Path) -> Any:
    """The folder of `two_ranks` and of the same on one, and what the two ranks returned."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny = [*TINY, f"data.path={frame_folders}"]
    run([*tiny, f"train.output_dir={folder / 'weights'}", "train.max_steps=10"])
    weights, metric = str(folder / "weights"), measured(detector)
    found = on_two_ranks(folder, two_ranks, tiny, str(folder), weights, metric)
    alone = ["train.max_steps=3", f"train.init_from={weights}", f"train.output_dir={folder / 'alone'}"]
    run(watched(tiny, *alone, *metric))
    return folder, found


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_the_same_and_see_the_same_bits_as_one(ranks: Ranks, kind: str) -> None:
    """Before the first step, when their weights are the same; of five clips and three videos, one is seen twice."""
    folder, found = ranks
    for rank in found:
        assert_same(rank[f"{kind}-seen"], rank[f"{kind}-plain"])
    assert logged(folder / f"{kind}-seen", "train") == logged(folder / f"{kind}-plain", "train")
    one, two = (logged(folder / name, "val")[0] for name in ("alone", f"{kind}-seen"))
    assert one == two and one["step"] == 0 and one["clips"] == 5 and 0 < one["ema/loss"] < 2
    if kind == "fsdp":
        assert set(pictures(folder / "alone")) == set(pictures(folder / "fsdp-seen"))
        one, two = (logged(folder / name, "metric")[0] for name in ("alone", "fsdp-seen"))
        assert one["ema/frechet_inception"] == pytest.approx(two["ema/frechet_inception"], rel=1e-4)
        assert one["step"] == 0


@pytest.mark.dist
def test_signals_and_failures_of_one_rank_stop_both(ranks: Ranks) -> None:
    folder, found = ranks
    assert [rank["signal"] for rank in found] == [0, 0]
    assert (folder / "signal" / "PREEMPTED").exists() and not logged(folder / "signal", "val", "train")
    assert (folder / "ddp-seen" / "COMPLETED").exists() and not logged(folder / "ddp-seen", "preview")
    assert len(logged(folder / "ddp-seen", "val")) == 3


@contextlib.contextmanager
def signalled_within_validation(hit: bool, call: int) -> Iterator[list[int]]:
    """Sends SIGTERM to this process, if it is `hit`, while it validates its `call`-th clip; yields all calls so far."""
    calls: list[int] = []
    honest = Validation._losses

    def losses(this: Validation, *arguments: Any) -> Any:
        calls.append(len(calls) + 1)
        if hit and calls[-1] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(this, *arguments)

    with MonkeyPatch.context() as patch:
        patch.setattr(Validation, "_losses", losses)
        yield calls


def test_a_signal_within_a_validation_saves_at_once_and_it_is_made_up_for(tiny: list[str], tmp_path: Path) -> None:
    """In the validation of step 4: 10 forwards are those of step 0, 10 those of step 2."""
    common = watched(tiny, "train.max_steps=6")
    run([*common, f"train.output_dir={tmp_path / 'whole'}"])
    parts = [*common, f"train.output_dir={tmp_path / 'parts'}"]
    with signalled_within_validation(True, call=23) as calls:
        stopped = run(parts)
    assert stopped.state.step == 4 and len(calls) == 24  # the clip in hand, with both networks, and no more
    assert (tmp_path / "parts" / "PREEMPTED").exists()
    assert ckpt.list_checkpoints(tmp_path / "parts" / "checkpoints")[-1].name == "step-0000004"
    assert [row["step"] for row in logged(tmp_path / "parts", "val")] == [0, 2]
    assert run(parts).state.step == 6
    kinds = ("train", "val", "preview")
    assert logged(tmp_path / "parts", *kinds) == logged(tmp_path / "whole", *kinds)
    assert pictures(tmp_path / "parts") == pictures(tmp_path / "whole")
    before = (tmp_path / "parts" / "metrics.jsonl").read_text()
    run(parts)  # a finished run is not observed twice
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == before


def test_a_signal_stops_a_preview_between_steps(tiny: list[str], tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    second: list[bool] = []  # of each call: whether it is within the second preview, that of step 3
    honest, previews = sample.preview.agree, tmp_path / "run" / "previews"

    def agree(run: Run) -> None:
        second.append((previews / "step-0000000" / "raw.mp4").exists())
        if second.count(True) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        honest(run)

    monkeypatch.setattr(sample.preview, "agree", agree)
    assert run(watched(tiny, "train.max_steps=6")).state.step == 3
    assert second.count(True) == 2 and not (previews / "step-0000003").exists()


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_training_continues_after_failures(
    tiny: list[str], tmp_path: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plain = run([*tiny, "train.max_steps=4", f"train.output_dir={tmp_path / 'plain'}"])
    monkeypatch.setattr(sample.preview, "write_mp4", no_space)
    monkeypatch.setattr(Validation, "_losses", no_memory)
    trainer = run(watched(tiny, "train.max_steps=4"))
    assert_same(state_of(trainer), state_of(plain))
    assert not logged(tmp_path / "run", "val", "preview")
    events = [row for row in rows(tmp_path / "run", "events.jsonl") if row["event"] == "callback_failed"]
    said = {"val": "OutOfMemoryError: CUDA out of memory", "preview": "[Errno 28] No space left on device"}
    due = {(step, "val") for step in (0, 2, 4)} | {(step, "preview") for step in (0, 3, 4)}
    assert {(row["step"], row["callback"]) for row in events} == due and len(events) == 6
    assert all(row["error"] == said[row["callback"]] for row in events)
    lines = capsys.readouterr().err.splitlines()
    assert all(f"warning: step 4, {kind}: {said[kind]}; training continues" in lines for kind in said)
    assert not [file for file in (tmp_path / "run" / "previews").rglob("*") if file.is_file()]


def test_the_watch_sees_signs_of_life(tiny: list[str]) -> None:
    """For every clip and every step of the sampler."""
    config = load_config(None, watched(tiny, "train.max_steps=1"))
    trainer = Trainer(config, World(), callbacks=train.callbacks(config))
    ticks = {"val": 0, "preview": 0}
    for callback in trainer.callbacks.all:
        trainer.run.watch.tick = lambda kind=callback.kind: ticks.update({kind: ticks[kind] + 1})  # type: ignore[method-assign]
        callback.prepare(trainer.run, trainer.state, trainer.objective)
        ticks[callback.kind] = 0
        callback.observe(trainer.run, trainer.state, trainer.objective)
    assert ticks == {"val": 5, "preview": 2 * 2 * 3 + 2 + 1}  # 2 batches, 2 networks, 3 steps; each batch; writing


@pytest.mark.parametrize(
    "extra", [["diffusion.prediction=flow", "model.learn_sigma=false"], ["sample.guidance_scale=3"]], ids=str
)
def test_previews_are_the_samples_of_the_checkpoint(
    tiny: list[str], tmp_path: Path, monkeypatch: MonkeyPatch, extra: list[str]
) -> None:
    spy = Mock(wraps=sample.preview.write_contact_sheet)
    monkeypatch.setattr(sample.preview, "write_contact_sheet", spy)
    settings = ["train.max_steps=3", "train.ema_decay=0.5", "optim.learning_rate=1e-2", "sample.seed=7"]
    run(watched(tiny, *settings, "sample.labels=[rises,falls]", *extra))
    folder = tmp_path / "run"
    written = {f"{path.parent.name}/{path.stem}": videos for (path, videos, *_), _ in spy.call_args_list}
    guidance = 3.0 if "sample.guidance_scale=3" in extra else 1.0
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert (written["step-0000003/ema"] != written["step-0000003/raw"]).any()
    for weights in ("ema", "raw"):
        generator = Generator.from_checkpoint(folder, weights=weights)
        expected = generator.sample(["rises", "falls"], 3, seed=7, steps=3, batch_size=2, guidance_scale=guidance)
        assert (written[f"step-0000003/{weights}"] == expected).all()
        assert (written[f"step-0000000/{weights}"] != expected).any()
        assert [event.step for event in board.Images(f"preview/{weights}")] == [0, 3]
        assert board.Images(f"preview/{weights}")[0].width > 4 * 64
    assert set(pictures(folder)) == {
        f"previews/step-000000{step}/{name}" for step in (0, 3) for name in ("ema.mp4", "ema.png", "raw.mp4", "raw.png")
    }


class Rude:
    """Draws from the global generator, changes the mode, takes 1,000 seconds of the clock in `now`."""

    kind, every = "rude", 1

    def __init__(self, now: list[float]) -> None:
        self.now = now

    def prepare(self, run: Run, state: TrainState, objective: Objective) -> list[str]:
        return self.observe(run, state, objective).line.split()

    def observe(self, run: Run, state: TrainState, objective: Objective) -> Observation:
        assert not state.model.training and not torch.is_grad_enabled()
        state.model.train(False)
        torch.randn(3)
        self.now[0] += 1000.0
        return Observation({"one": 1}, "nothing")


def test_a_rude_callback_does_no_harm(tiny: list[str], tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("engine.run_folder.time.perf_counter", lambda: now[0])
    states = []
    for name, callbacks in (("plain", []), ("rude", [Rude(now)])):
        config = load_config(None, [*tiny, "train.max_steps=3", f"train.output_dir={tmp_path / name}"])
        trainer = Trainer(config, World(), callbacks=callbacks)
        original = trainer.launch_step

        def step(batch: Any, original: Any = original) -> Any:
            now[0] += 1.0
            return original(batch)

        trainer.launch_step = step  # type: ignore[method-assign]
        torch.manual_seed(5)
        trainer.fit()
        assert trainer.state.model.training
        states.append(trainer.state_dict())
    assert torch.equal(states[0].rng["cpu/0"], states[1].rng["cpu/0"])
    assert_same(*({"model": each.model, "ema": each.ema, "optim": each.optim} for each in states))
    assert [row["seconds_per_step"] for row in rows(tmp_path / "rude") if row["kind"] == "train"] == [1.0, 1.0, 1.0]


def test_the_metric_is_that_of_the_checkpoint(tiny: list[str], tmp_path: Path, detector: Path) -> None:
    run(watched(tiny, "train.max_steps=3", "train.ema_decay=0.5", "optim.learning_rate=1e-2", *measured(detector)))
    fake = Generator.from_checkpoint(tmp_path / "run").sample(num=4, steps=3, batch_size=2)
    config = load_config(None, tiny)
    clips = build_dataset(config.data, seed=config.train.seed)
    real = [((clips[0, index]["video"] + 1) * 127.5).round() for index in (0, 1, 3, 4)]  # 4 of 6, spread
    network = inception()
    with torch.no_grad():
        features = [
            network(pixels.flatten(0, 1).to(torch.uint8), return_features=True)
            for pixels in (torch.stack(real), torch.from_numpy(fake).permute(0, 1, 4, 2, 3))
        ]
    first, last = logged(tmp_path / "run", "metric")
    distance = pytest.approx(frechet_distance(*features), rel=1e-4)
    assert last == {"step": 3, "kind": "metric", "videos": 4, "clips": 4, "ema/frechet_inception": distance}
    assert first["ema/frechet_inception"] != last["ema/frechet_inception"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("monitor.metric_detector=inception_is", "metric_detector=inception_is is not one of i3d, "),
        ("monitor.metric_detector_path=/nowhere.pt", r"/nowhere\.pt"),
        ("monitor.metric_detector_sha256=beef", "but beef is expected"),
        ("monitor.metric_detector=i3d", r"inception\.pt"),
        ("monitor.metric_detector=i3d monitor.metric_detector_path={}/i3d.pt", "i3d takes clips of 10 or more"),
        ("sample.labels=[sideways]", r"sample\.labels: 'sideways' is not a class of this network"),
        ("data.val_path={}/val data.labels=class_folders", r"a\.mp4"),
    ],
)
def test_mistakes_end_a_run(tiny: list[str], tmp_path: Path, detector: Path, settings: str, sentence: str) -> None:
    torch.jit.script(StubI3D()).save(tmp_path / "i3d.pt")
    (tmp_path / "val" / "falls").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "val" / "falls" / f"{name}.mp4").write_bytes(b"no video")
    refuses(sentence, run, watched(tiny, "train.max_steps=2", *measured(detector), *settings.format(tmp_path).split()))
    assert not ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")
