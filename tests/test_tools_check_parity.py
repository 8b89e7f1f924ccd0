"""check_parity: goldens pass, anything tampered with does not, and other folders of the format are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion import DiffusionConfig, GaussianDiffusion
from models.latte import Latte
from tools.check_parity import compare_all, main
from tools.parity.checks import CHECKS, empty_network
from tools.parity.goldens import OFFICIAL_DEFAULTS, Goldens, Setting

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
NETWORK = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_frames": 4}


def failures(folder: Path) -> set[str]:
    """Returns the names of everything that fails in a folder, except whole files that are missing."""
    found = compare_all(Setting(folder, "cpu", "fp32"))
    return {outcome.name for outcome in found if not outcome.ok and "no such file" not in outcome.problem}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], config: dict | None = None) -> None:
    """Change the tensors (and configuration) of a golden file in place."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"config": json.dumps(config)} if config is not None else metadata)


def copy(tmp_path: Path, *names: str) -> Path:
    """A folder with some of the goldens."""
    for name in names:
        shutil.copy(GOLDENS / name, tmp_path / name)
    return tmp_path


def test_goldens_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDENS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "95 of 95 within bounds (cpu, fp32)"
    assert all(line.startswith("ok  ") for line in lines[:-1])
    assert any("latte_class/cfg_out" in line for line in lines)
    with pytest.raises(FileNotFoundError, match="no/such/folder is not a folder; give the one that holds the goldens"):
        main(["no/such/folder"])


def test_shared_goldens_pass_and_ours_are_their_copy() -> None:
    official = ROOT.parent / "shared" / "goldens" / "official-tiny"
    if not official.is_dir():
        pytest.skip("there is no ../shared/goldens")
    for path in official.iterdir():
        assert path.read_bytes() == (GOLDENS / path.name).read_bytes(), path.name


CHANGES = [  # file, tensor, quantity that must notice
    ("latte_uncond", "out", "out"),
    ("latte_uncond", "x", "out"),
    ("latte_uncond", "state/final_layer.linear.bias", "out"),
    ("latte_uncond", "state/temp_embed", "state/temp_embed"),
    ("latte_class", "cfg_out", "cfg_out"),
    ("latte_class", "y", "out"),
    ("latte_img_class", "y_image", "out"),
    ("latte_img_uncond", "out", "out"),
    ("diffusion", "table/posterior_mean_coef1", "table/posterior_mean_coef1"),
    ("diffusion", "schedule/squaredcos_cap_v2", "schedule/squaredcos_cap_v2"),
    ("diffusion", "respaced/10,15,20/timesteps", "respaced/10,15,20/timesteps"),
    ("diffusion", "loss/rescaled/vb", "loss/rescaled/vb"),
    ("diffusion", "loss/kl/loss", "loss/kl/loss"),
    ("diffusion", "p/fixed_large/log_variance", "p/fixed_large/log_variance"),
    ("diffusion", "x_t", "x_t"),
    ("diffusion", "ddim/eta0.5/sample", "ddim/eta0.5/sample"),
    ("diffusion", "ddim_reverse", "ddim_reverse"),
    ("diffusion", "loop/ddpm10", "loop/ddpm10"),
    ("diffusion", "loop/z", "loop/ddim10"),
    ("transforms", "75x133/resize_then_center_crop_64", "75x133/resize_then_center_crop_64"),
    ("frechet", "distance", "distance"),
    ("frechet", "real", "distance"),
    ("train_trajectory", "loss", "loss"),
    ("train_trajectory", "grad_norm", "grad_norm"),
    ("train_trajectory", "final/blocks.3.mlp.fc2.weight", "final/*"),
    ("train_trajectory", "ema/blocks.0.attn.qkv.bias", "ema/*"),
]


MISSING = [
    ("latte_class", "cfg_out", "cfg_out"),
    ("latte_uncond", "state/blocks.0.mlp.fc1.bias", "out"),
    ("diffusion", "loss/default/mse", "loss/default/mse"),
    ("diffusion", "respaced/7/timesteps", "respaced/7/timesteps"),
    ("transforms", "96x128/clip", "96x128/resize_then_center_crop_64"),
    ("transforms", "96x128/center_crop_then_resize_64", "96x128/center_crop_then_resize_64"),
    ("train_trajectory", "ema/pos_embed", "ema/*"),
]
NAN = [("latte_uncond", "out", "out")]


def add_one(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] += 1


def put_nan(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[0].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "file", "tensor", "quantity"),
    [
        *((add_one, *each) for each in CHANGES),
        *((dict.pop, *each) for each in MISSING),
        *((put_nan, *each) for each in NAN),
    ],
)
def test_one_changed_or_missing_number_fails(
    tmp_path: Path, change: Callable[..., object], file: str, tensor: str, quantity: str
) -> None:
    extra = ["latte_uncond.safetensors"] if tensor.startswith("loop/") else []
    folder = copy(tmp_path, f"{file}.safetensors", *extra)
    rewrite(folder / f"{file}.safetensors", lambda tensors: change(tensors, tensor))
    assert f"{file}/{quantity}" in failures(folder)


def test_missing_loops_and_files_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tmp_path, "frechet.safetensors", "diffusion.safetensors")
    rewrite(folder / "diffusion.safetensors", lambda tensors: tensors.pop("loop/ddpm10"))
    (folder / "transforms.safetensors").write_bytes(b"broken")
    assert main([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  latte_class  " in printed
    assert "no such file" in printed
    assert "FAIL  diffusion  " in printed
    assert "FAIL  transforms  " in printed
    assert "ok    frechet/distance" in printed


def test_key_lists_notice_shapes_names_and_counts(tmp_path: Path) -> None:
    lists = json.loads((GOLDENS / "state_dict_keys.json").read_text())
    small, classes = lists["Latte-S/2 extras=1"], lists["Latte-S/2 extras=2"]
    changed = {
        "Latte-S/2 extras=1": small,
        "Latte-S/2 extras=1 shape": small | {"final_layer.linear.bias": [33]},
        "Latte-S/2 extras=1 name": small | {"blocks.12.attn.qkv.bias": [1152]},
        "Latte-S/2 extras=2 count": classes | {"__params__": classes["__params__"] + 1},
    }
    (tmp_path / "state_dict_keys.json").write_text(json.dumps(changed))
    assert failures(tmp_path) == {f"state_dict_keys/{name}" for name in list(changed)[1:]}


def test_bf16_widens_the_bounds_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDENS), "--precision", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "widened from 1e-05 to 5e-02" in lines[0]
    table = next(line for line in lines if "diffusion/table/betas" in line)
    assert table.endswith("1.00e-05")
    out = next(line for line in lines if "latte_uncond/out" in line)
    assert float(out.split()[3]) > 1e-4  # it did run in bf16


# ---- another folder of the format ----------------------------------------------------------------


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a network that no layer of is zero."""
    model: Latte = empty_network(OFFICIAL_DEFAULTS | config)
    state = model.state_dict()
    for number, (key, value) in enumerate(model.named_parameters()):
        state[key] = value.detach() + 0.1 * randn(*value.shape, seed=number)
    return {f"state/{key}": value for key, value in state.items()}


def fill_in(folder: Path, stem: str, config: dict[str, Any], tensors: dict[str, Tensor], *names: str) -> None:
    """Write a golden file whose outputs are our own: it tests what is read, not what is computed."""
    path = folder / f"{stem}.safetensors"
    placeholders = {name: torch.zeros(1) for name in names}
    save_file(tensors | placeholders, path, {"config": json.dumps(config)})
    computed: dict[str, Tensor] = {}
    for quantity in CHECKS[stem](Goldens(path, "cpu"), Setting(folder, "cpu", "fp32")):
        value = quantity.compute()
        prefix = quantity.name.removesuffix("*")
        computed |= {prefix + k: v for k, v in value.items()} if isinstance(value, dict) else {prefix: value}
    computed = {name: value.detach().clone().contiguous() for name, value in computed.items()}
    save_file(tensors | computed, path, {"config": json.dumps(config)})


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other shapes, sizes, seeds, numbers of steps; configurations that leave out what has a default."""
    folder = tmp_path_factory.mktemp("other")
    video = {
        "input_size": 12,
        "patch_size": 4,
        "in_channels": 3,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
    }
    video |= {"num_frames": 5, "extras": 1}
    labelled = video | {"extras": 2, "num_classes": 3, "cfg_scale": 1.5}
    x, t = randn(3, 5, 3, 12, 12, seed=1), torch.tensor([5, 77, 999])
    fill_in(folder, "latte_uncond", video, random_state(video) | {"x": x, "t": t})
    guidance = {"cfg_x": randn(2, 5, 3, 12, 12, seed=2), "cfg_t": torch.tensor([8, 8])}
    guidance |= {"cfg_y": torch.tensor([2, 3]), "y": torch.tensor([0, 1, 3])}
    fill_in(folder, "latte_class", labelled, random_state(labelled) | {"x": x, "t": t} | guidance)
    joint = {"use_image_num": 2, "class_dropout_prob": 0.0}
    images = {"x": randn(3, 7, 3, 12, 12, seed=1), "t": t}
    labels = {"y": torch.tensor([0, 1, 2]), "y_image": torch.tensor([[1, 2], [0, 0], [2, 1]])}
    fill_in(folder, "latte_img_class", labelled | joint, random_state(labelled | joint) | images | labels)
    fill_in(folder, "latte_img_uncond", video | joint, random_state(video | joint) | images)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    inputs = {"table/betas": betas, "t": t, "step_t": torch.tensor([9, 1, 0]), "loop/z": x}
    inputs |= {name: randn(3, 5, 3, 12, 12, seed=ord(name[0])) for name in ("x0", "noise", "step_noise")}
    inputs["model_output"] = randn(3, 5, 6, 12, 12, seed=4)
    inputs["x_t"] = GaussianDiffusion(DiffusionConfig()).q_sample(inputs["x0"], t, inputs["noise"])
    names = ["respaced/ddim8/betas", "respaced/3,4/timesteps", "loop/ddpm6", "loop/ddim4"]
    names += ["ddim/eta0.0/sample", "ddim/eta0.25/sample"]
    note = {"note": "loops use latte_uncond, manual_seed(11) right before the loop"}
    fill_in(folder, "diffusion", note, inputs, *names)
    clip = torch.arange(2 * 3 * 50 * 70).view(2, 3, 50, 70).to(torch.uint8)
    fill_in(folder, "transforms", {}, {"50x70/clip": clip}, "50x70/resize_then_center_crop_32")
    fill_in(folder, "frechet", {}, {"real": randn(9, 4, seed=1), "fake": randn(8, 4, seed=2)})
    batches = {"x0": randn(3, 2, 5, 3, 12, 12, seed=5), "noise": randn(3, 2, 5, 3, 12, 12, seed=6)}
    batches |= {"t": torch.tensor([[3, 900], [500, 20], [0, 999]])}
    training = video | {"lr": 1e-3, "ema_decay": 0.9}
    fill_in(folder, "train_trajectory", training, random_state(video) | batches, "final/x", "ema/x")
    return folder


def test_another_folder_of_the_format_is_read(other_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(other_folder)]) == 0
    printed = capsys.readouterr().out
    for name in (
        "latte_class/cfg_out",
        "diffusion/loop/ddpm6",
        "diffusion/loop/ddim4",
        "diffusion/respaced/3,4/betas",
        "diffusion/ddim/eta0.25/sample",
        "transforms/50x70/center_crop_then_resize_32",
        "train_trajectory/ema/*",
    ):
        assert f"ok    {name} " in printed


def test_what_the_configuration_says_is_used(other_folder: Path, tmp_path: Path) -> None:
    """Changing a value in the metadata alone must show."""
    shutil.copytree(other_folder, tmp_path, dirs_exist_ok=True)
    for stem, key, value in (
        ("latte_class", "cfg_scale", 4.0),
        ("train_trajectory", "lr", 1e-2),
        ("diffusion", "note", "manual_seed(12) right before the loop"),
        ("latte_img_uncond", "use_image_num", 1),
    ):
        path = tmp_path / f"{stem}.safetensors"
        config = Goldens(path, "cpu").config
        rewrite(path, lambda tensors: None, config | {key: value})
    assert failures(tmp_path) == {
        "latte_class/cfg_out",
        "diffusion/loop/ddpm6",
        "latte_img_uncond/out",
        "train_trajectory/loss",
        "train_trajectory/grad_norm",
        "train_trajectory/final/*",
        "train_trajectory/ema/*",
    }


def test_unknown_tensors_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tmp_path, "frechet.safetensors")
    rewrite(folder / "frechet.safetensors", lambda tensors: tensors.update(kernel=torch.zeros(1)))
    main([str(folder)])
    assert "note  frechet" in (printed := capsys.readouterr().out)
    assert "not known: kernel" in printed
