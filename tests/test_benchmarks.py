"""The benchmarks: the reference is the official algorithm, and the commands run where little is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.profile import Roof, operators, trace_of
from benchmarks.reference import ReferenceDiffusion, ReferenceLatte, ReferenceTraining, guided_network
from benchmarks.report import COLUMNS, Section
from benchmarks.timing import Timing
from benchmarks.workload import Workload
from models import LatteConfig
from tools.parity.checks import empty_network
from tools.parity.goldens import Goldens

GOLDENS = Path(__file__).parent / "goldens"


def load(name: str) -> Goldens:
    return Goldens(GOLDENS / f"{name}.safetensors", "cpu")


def reference(golden: Goldens) -> ReferenceLatte:
    """The reference with the golden's weights."""
    ours = empty_network(golden.config)
    plain = ReferenceLatte(
        ours.config, in_channels=ours.in_channels, latent_size=ours.latent_size[0], num_frames=ours.num_frames
    )
    plain.load_state_dict(golden.group("state/"))
    return plain


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
    close(ReferenceDiffusion(1000, "10").sample(model, golden["loop/z"], method), golden[f"loop/{method}10"])


def test_our_network_equals_the_reference() -> None:
    """Same weights and inputs, output and gradients, labels per image as well."""
    golden = load("latte_img_class")
    ours = empty_network(golden.config)
    ours.load_state_dict(golden.group("state/"))
    plain = ReferenceLatte.like(ours)
    labels = torch.cat([golden["y"][:, None], golden["y_image"]], 1)
    first, second = (
        model(golden["x"], golden["t"], labels, num_images=golden.config["use_image_num"]) for model in (ours, plain)
    )
    close(first, second, 1e-6)
    first.square().mean().backward()
    second.square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, theirs[name].grad, 1e-6)


def test_the_reference_refuses_what_the_official_code_lacks() -> None:
    with pytest.raises(ValueError, match="interleaved"):
        ReferenceLatte(LatteConfig(name="Latte-S/8", variant="parallel"))


# ---- the commands ------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ["diffusers", "omegaconf", "decord", "av", "imageio", "tensorboard", "matplotlib", "peft", "pyarrow"]


def test_the_gpu_bench_runs_where_little_is_installed(tmp_path: Path) -> None:
    """The same path on the CPU, in a process that cannot import what a bare GPU machine lacks."""
    code = (
        f"import sys; sys.modules |= dict.fromkeys({ABSENT})\n"
        "from benchmarks.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["gpu", "--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path), "--traces", str(tmp_path)]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(map(len, done.stdout.splitlines())) <= COLUMNS
    tables = {table["title"]: table["rows"] for table in json.loads((tmp_path / "gpu.json").read_text())["tables"]}
    assert {"Training step", "Forward pass", "Techniques, one by one", "bf16, guided"} <= tables.keys()
    assert all(row["ratio"] > 0 and row["wall_s"] for row in tables["Training step"])
    apart = next(row for row in tables["bf16, guided"] if row[""] == "guidance one by one")
    assert apart["apart"] < 1e-2  # it changes no result
    page = (tmp_path / "gpu.md").read_text()
    assert "commit" in page and "--quick" in page and "| reference, tf32 |" in page
    assert json.loads((tmp_path / "compiled-bf16-cpu.json").read_text())["traceEvents"]


def test_attention_has_a_row_for_each_candidate_with_its_error(tmp_path: Path) -> None:
    main(["attention", "--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path)])
    tables = {
        table["title"]: table["rows"] for table in json.loads((tmp_path / "attention.json").read_text())["tables"]
    }
    over_time = {row[""]: row for row in tables["Over time, fp32, batch 1"]}
    assert over_time.keys() == {"fused", "plain", "fused, a row for each token", "fused, three projections"}
    assert all(row["error"] < 1e-6 and row["both ms"] > 0 for row in over_time.values())
    assert all(row["error"] < 1e-2 for row in tables["Over space, bf16, batch 1"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--batch", "0"], "--batch must be at least 1"),
        (["memory", "--kind", "mine"], "--kind mine is unknown"),
        (["train", "--size", "Latte-M/2"], "Latte-M/2"),
        (["train", "--quick", "--size", "Latte-S/2"], "--quick has tiny sizes of its own: omit --size"),
        (["data", "--videos", "nowhere.mp4"], "there is no file nowhere.mp4"),
    ],
)
def test_mistakes_are_sentences(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        main([*words, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_ratios_are_of_rounds_and_tables_fit_the_terminal() -> None:
    ours, theirs = Timing(wall=[1.0, 2.0, 4.0]), Timing(wall=[2.0, 3.0, 8.0])
    assert ours.times_as_fast_as(theirs) == 2.0 and (ours.median, ours.least, ours.spread) == (2.0, 1.0, 1.5)
    long = "a name that is too long for one line of a terminal beside its figures, so that it is broken"
    section = Section(
        "Title", "text " * 40, {"": "", "s": ".2f", "share": ".0%"}, [{"": long, "s": 1.234, "share": 0.5}]
    )
    assert max(map(len, section.terminal().splitlines())) <= COLUMNS
    assert f"| {long} | 1.23 | 50% |" in section.markdown()


def test_a_bound_is_the_roofline_s() -> None:
    a = torch.randn(64, 64)
    trace = trace_of(lambda: a @ a, torch.device("cpu"))
    flop, bytes_ = 2 * 64**3, 3 * 64 * 64 * 4
    for roof, bound in ((Roof(1.0, bytes_ * 1e6), "compute"), (Roof(flop * 1e6, 1.0), "memory")):
        row = next(row for row in operators(trace, roof, 4, on_device=False) if row[""] == "mm")
        assert row["bound"] == bound and row["calls"] == 1
        assert row["of the roof"] * row["ms"] / 1e3 == pytest.approx(max(flop / roof.flops, bytes_ / roof.bandwidth))


def test_flop_of_a_clip_are_those_of_the_table() -> None:
    """Latte-XL/2 takes 3.7257 TFLOP a clip (counted by hand); images pay for the layers over space alone."""
    assert Workload("Latte-XL/2", batch=1).flop() == pytest.approx(3.7257e12, rel=1e-3)
    assert Workload("Latte-XL/2", batch=2, images=8).flop() == pytest.approx(2 * 4.67e12, rel=2e-3)
