"""check_parity: goldens pass, anything tampered with does not, and other folders of the format are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import ROOT, refuses
from tools.check_parity import compare_all, main
from tools.parity import Goldens, Setting

GOLDENS = ROOT / "tests" / "goldens"


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
    for name in names:
        shutil.copy(GOLDENS / name, tmp_path / name)
    return tmp_path


def test_goldens_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDENS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "95 of 95 within bounds (cpu, fp32)"
    assert all(line.startswith("ok  ") for line in lines[:-1])
    errors = {line.split()[1]: float(line.split()[3]) for line in lines if "  latte_" in line}
    for name in ("latte_uncond", "latte_class", "latte_img_class", "latte_img_uncond"):
        assert errors[f"{name}/out"] < 1e-6  # by far
        assert errors[f"{name}/state/temp_embed"] == errors[f"{name}/state/pos_embed"] == 0
    refuses("no/such/folder is not a folder; give the one that holds the goldens", main, ["no/such/folder"])


def test_shared_goldens_pass_and_ours_are_their_copy() -> None:
    official = ROOT.parent / "shared" / "goldens" / "official-tiny"
    if not official.is_dir():
        pytest.skip("there is no ../shared/goldens")
    for path in official.iterdir():
        assert path.read_bytes() == (GOLDENS / path.name).read_bytes(), path.name


def add_one(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] += 1


def put_nan(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[0].fill_(float("nan"))


CHANGES = [  # file, tensor, quantity that must notice
    ("latte_uncond", "out", "out"),
    ("latte_uncond", "state/temp_embed", "state/temp_embed"),
    ("latte_class", "cfg_out", "cfg_out"),
    ("latte_img_class", "y_image", "out"),
    ("latte_img_uncond", "out", "out"),
    ("diffusion", "table/posterior_mean_coef1", "table/posterior_mean_coef1"),
    ("diffusion", "schedule/squaredcos_cap_v2", "schedule/squaredcos_cap_v2"),
    ("diffusion", "respaced/10,15,20/timesteps", "respaced/10,15,20/timesteps"),
    ("diffusion", "loss/rescaled/vb", "loss/rescaled/vb"),
    ("diffusion", "p/fixed_large/log_variance", "p/fixed_large/log_variance"),
    ("diffusion", "ddim/eta0.5/sample", "ddim/eta0.5/sample"),
    ("diffusion", "loop/ddpm10", "loop/ddpm10"),
    ("diffusion", "loop/z", "loop/ddim10"),
    ("transforms", "75x133/resize_then_center_crop_64", "75x133/resize_then_center_crop_64"),
    ("frechet", "distance", "distance"),
    ("train_trajectory", "loss", "loss"),
    ("train_trajectory", "final/blocks.3.mlp.fc2.weight", "final/*"),
    ("train_trajectory", "ema/blocks.0.attn.qkv.bias", "ema/*"),
]
MISSING = [
    ("latte_class", "cfg_out", "cfg_out"),
    ("latte_uncond", "state/blocks.0.mlp.fc1.bias", "out"),
    ("diffusion", "loss/default/mse", "loss/default/mse"),
    ("transforms", "96x128/center_crop_then_resize_64", "96x128/center_crop_then_resize_64"),
    ("train_trajectory", "ema/pos_embed", "ema/*"),
]
ALL = [*((add_one, *each) for each in CHANGES), *((dict.pop, *each) for each in MISSING), (put_nan, *CHANGES[0])]


@pytest.mark.parametrize(("change", "file", "tensor", "quantity"), ALL)
def test_one_changed_or_missing_number_fails(
    tmp_path: Path, change: Callable[..., object], file: str, tensor: str, quantity: str
) -> None:
    extra = ["latte_uncond.safetensors"] if tensor.startswith("loop/") else []
    folder = copy(tmp_path, f"{file}.safetensors", *extra)
    rewrite(folder / f"{file}.safetensors", lambda tensors: change(tensors, tensor))
    assert f"{file}/{quantity}" in failures(folder)


def test_missing_parts_fail_and_unknown_ones_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tmp_path, "frechet.safetensors", "diffusion.safetensors")
    rewrite(folder / "diffusion.safetensors", lambda tensors: tensors.pop("loop/ddpm10"))
    rewrite(folder / "frechet.safetensors", lambda tensors: tensors.update(kernel=torch.zeros(1)))
    (folder / "transforms.safetensors").write_bytes(b"broken")
    assert main([str(folder)]) == 1
    printed = capsys.readouterr().out
    for line in ("FAIL  latte_class  ", "no such file", "FAIL  diffusion  ", "FAIL  transforms  ",
                 "ok    frechet/distance", "note  frechet", "not compared: kernel"):  # fmt: skip
        assert line in printed


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


def test_what_the_configuration_says_is_used(tmp_path: Path) -> None:
    """Seeds, sizes and rates stand in the metadata, where another folder has its own."""
    names = ("latte_uncond", "latte_class", "latte_img_uncond", "diffusion", "train_trajectory")
    folder = copy(tmp_path, *(f"{name}.safetensors" for name in names))
    for stem, key, value in (
        ("latte_class", "cfg_scale", 4.0),
        ("train_trajectory", "lr", 1e-2),
        ("diffusion", "note", "manual_seed(12) right before the loop"),
        ("latte_img_uncond", "use_image_num", 1),
    ):
        path = folder / f"{stem}.safetensors"
        rewrite(path, lambda tensors: None, Goldens(path, "cpu").config | {key: value})
    found = failures(folder)
    assert {"latte_class/cfg_out", "latte_img_uncond/out", "train_trajectory/final/*"} <= found
    assert any(name.startswith("diffusion/loop/ddpm") for name in found)
    assert "latte_class/out" not in found and "diffusion/loop/ddim10" not in found
