"""The benchmarks: the reference is the official algorithm, and the commands run where little is installed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.profile import Roof, operators, trace_of
from benchmarks.reference import ReferenceDiffusion, ReferenceLatte, ReferenceTraining, guided_network
from benchmarks.report import Table
from benchmarks.timing import VALUES, Case, Timer
from benchmarks.workload import Workload
from diffusion import sample
from tests.conftest import ROOT, refuses
from tools.parity import Goldens, empty_network

GOLDENS = Path(__file__).parent / "goldens"


def load(name: str) -> Goldens:
    return Goldens(GOLDENS / f"{name}.safetensors", "cpu")


def reference(golden: Goldens) -> ReferenceLatte:
    ours = empty_network(golden.config)
    ours.load_state_dict(golden.group("state/"))
    return ReferenceLatte.like(ours)


def close(ours: Tensor, wanted: Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == wanted.shape
    assert (ours.double() - wanted.double()).abs().max() <= relative * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("name", ["latte_uncond", "latte_class", "latte_img_class", "latte_img_uncond"])
def test_the_reference_network_is_the_official_one(name: str) -> None:
    golden = load(name)
    labels, images = None, golden.config["use_image_num"]
    if golden.config["extras"] == 2:
        labels = torch.cat([golden["y"][:, None], golden["y_image"]], 1) if images else golden["y"]
    model = reference(golden)
    with torch.no_grad():
        close(model(golden["x"], golden["t"], labels, num_images=images), golden["out"])
        if name == "latte_class":
            network = guided_network(model, golden.config["cfg_scale"])
            close(network(golden["cfg_x"], golden["cfg_t"], golden["cfg_y"]), golden["cfg_out"])


def test_the_reference_step_is_the_official_one() -> None:
    golden = load("train_trajectory")
    training = ReferenceTraining(reference(golden), clip=True)
    for index, (loss, norm) in enumerate(zip(golden["loss"], golden["grad_norm"])):
        value = training.step(golden["x0"][index], None, golden["t"][index], golden["noise"][index])
        close(torch.tensor(value), loss)
        close(training.gradient_norm, norm)
    for prefix, model in (("final/", training.model), ("ema/", training.average)):
        state = model.state_dict()
        for key, wanted in golden.group(prefix).items():
            close(state[key], wanted)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_the_reference_loop_is_the_official_one(method: str) -> None:
    golden, model = load("diffusion"), reference(load("latte_uncond"))
    torch.manual_seed(7)
    found = sample(ReferenceDiffusion(1000, "10"), model, golden["loop/z"], method=method)
    close(found, golden[f"loop/{method}10"])


ABSENT = ["diffusers", "omegaconf", "decord", "av", "imageio", "tensorboard", "matplotlib", "peft", "pyarrow"]


def test_the_gpu_bench_runs_where_little_is_installed(tmp_path: Path) -> None:
    """The same path on the CPU, in a process that cannot import what a bare GPU machine lacks."""
    start = "from benchmarks.__main__ import main; sys.exit(main(sys.argv[1:]))"
    code = f"import sys; sys.modules |= dict.fromkeys({ABSENT}); {start}"
    words = ["gpu", "--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path), "--traces", str(tmp_path)]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = {table["title"]: table["rows"] for table in json.loads((tmp_path / "gpu.json").read_text())["tables"]}
    step = "Training step, bf16, batch 1"
    assert {step, "Forward pass, bf16, batch 1", "Techniques, one by one", "bf16, guided"} <= tables.keys()
    assert all(row["ratio"] > 0 and row["seconds"] for row in tables[step])
    apart = next(row for row in tables["bf16, guided"] if row[""] == "guidance one by one")
    assert apart["apart"] < 1e-2  # it changes no result
    over_time = {row[""]: row for row in tables["Over time, bf16, batch 1"]}
    assert over_time.keys() == {"fused", "plain", "fused, a row for each token", "fused, three projections"}
    assert all(row["error"] < 1e-2 and row["both ms"] > 0 for row in over_time.values())
    page = (tmp_path / "gpu.md").read_text()
    assert "commit" in page and "--quick" in page and "| reference, fp32 " in page
    assert json.loads((tmp_path / "compiled-bf16-cpu.json").read_text())["traceEvents"]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    for words, sentence in (
        *(() if torch.cuda.is_available() else [(["gpu"], "no CUDA device found")]),
        (["train", "--batch", "0"], "--batch must be at least 1"),
        (["train", "--size", "Latte-M/2"], "Latte-M/2"),
        (["train", "--quick", "--size", "Latte-S/2"], "--quick sets its own tiny sizes: omit --size"),
    ):
        refuses(sentence, main, [*words, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at_once", [True, False])
def test_every_case_is_compared_with_the_first(at_once: bool) -> None:
    calls: list[str] = []

    def maker(name: str, result: float) -> Callable[[], Case]:
        def call() -> Tensor:
            calls.append(name)
            return torch.full((3,), result)

        return lambda: Case(call, videos=2)

    def too_large() -> Case:
        raise torch.OutOfMemoryError

    makers = {"a": maker("a", 2.0), "b": maker("b", 3.0), "large": too_large, "c": maker("c", 2.0)}
    rows = {row[""]: row for row in Timer(rounds=2).compare(makers, ("ratio", "apart"), at_once=at_once)}
    assert rows.keys() == {"a", "b", "large: no room", "c"}
    assert (rows["a"]["ratio"], rows["b"]["apart"], rows["c"]["apart"]) == (1.0, 0.5, 0.0)
    ours, theirs = Case(calls.clear, seconds=[1.0, 2.0, 4.0]), Case(calls.clear, seconds=[2.0, 3.0, 8.0])
    assert (ours.times_as_fast_as(theirs), ours.median, VALUES["spread"](ours, theirs)) == (2.0, 2.0, 1.5)
    table = Table("Title", "text", ("s", "share", "d"), [{"": "plain", "s": 1.234, "share": 0.5}])
    assert "| plain | 1.23 | 50.0% | - |" in table.markdown()
    assert "".join(calls) == ("abc" + 2 * "abc" if at_once else "aaa" + "b" + 2 * "ab" + "c" + 2 * "ac")


def test_the_shipped_figures_of_quality_are_read(tmp_path: Path) -> None:
    shipped = ROOT / "docs" / "benchmarks"
    shutil.copy(shipped / "sampling.json", tmp_path)
    main(["quality", "--device", "cpu", "--out", str(tmp_path)])
    tables = [line for line in (tmp_path / "sampling.md").read_text().splitlines() if line.startswith("| ")]
    assert tables == [line for line in (shipped / "sampling.md").read_text().splitlines() if line.startswith("| ")]
    assert len(tables) == 2 * 2 + 1 + 28 + 5 and (tmp_path / "sampling.png").is_file()


def test_a_bound_is_the_roofline_s() -> None:
    a = torch.randn(64, 64)
    trace = trace_of(lambda: a @ a, Timer())
    flop, bytes_ = 2 * 64**3, 3 * 64 * 64 * 4
    for roof, bound in ((Roof(1.0, bytes_ * 1e6), "compute"), (Roof(flop * 1e6, 1.0), "memory")):
        row = next(row for row in operators(trace, roof, 4, on_device=False) if row[""] == "mm")
        assert row["bound"] == bound and row["calls"] == 1
        assert row["of the roof"] * row["ms"] / 1e3 == pytest.approx(max(flop / roof.flops, bytes_ / roof.bandwidth))


def test_flop_of_a_clip_are_those_of_the_table() -> None:
    """Latte-XL/2 takes 3.7257 TFLOP a clip (counted by hand); images pay for the layers over space alone."""
    assert Workload("Latte-XL/2", batch=1).flop() == pytest.approx(3.7257e12, rel=1e-3)
    assert Workload("Latte-XL/2", batch=2, images=8).flop() == pytest.approx(2 * 4.67e12, rel=2e-3)
