"""docs/from_official.md: its code runs, its tables agree with the code, official commands and flags exist."""

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.keys import DROPPED, OMITTED, REMARKS, RENAMED, TEXT_DROPPED, TEXT_RENAMED, translate_config
from engine.run_folder import read_rows
from evaluation.protocols import parse_metric
from sample.video_io import write_mp4
from tests.conftest import ROOT
from tests.fault_support import call

PAGE = (ROOT / "docs/from_official.md").read_text()
SCRIPTS = "train sample.sample sample.sample_ddp sample.sample_t2x tools.calc_metrics_for_dataset tools.convert"
MAINS = {name: import_module(name).main for name in (*SCRIPTS.split(), "tools.convert_videos_to_frames")}
OFFICIAL = 'dataset: "ffs"\nmodel: Latte-S/8\nsave_ceph: True\nextras: 1\nnum_classes:\n'


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The rows of the tables in `text`, without their heads."""
    rows = re.sub(r"^\|.*\n\|---.*\n", "", text, flags=re.MULTILINE)
    return [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", rows, re.MULTILINE)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the files that the page's code reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "clips").mkdir()
    write_mp4("clips/a.mp4", np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8))
    torch.save({"ema": {"weight": torch.ones(2)}}, "ffs.pt")
    (tmp_path / "OFFICIAL.yaml").write_text(OFFICIAL)
    return tmp_path


def test_commands_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in "".join(blocks("bash")).splitlines():
        words = [word for word in shlex.split(line) if word not in ("python", "-m")]
        assert MAINS[words[0].removesuffix(".py")](words[1:]) in (0, None)
    out, report = capsys.readouterr()
    assert '"trainable_parameters"' in out and "dropped   save_ceph: " in report


def test_python_of_the_page(folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, "results/ffs_train")
    imports, lines = blocks("python")
    names: dict[str, Any] = {}
    exec(imports, names)  # noqa: S102
    calls = [cells[-1].strip("`") for cells in table(section("Python"))]
    assert len(calls) > 20
    for code in calls:
        exec(code, names)  # noqa: S102
    assert (names["noise_and_variance"].shape, names["latents"].shape) == ((1, 16, 8, 32, 32), (1, 16, 4, 32, 32))
    assert (names["clip"].shape, names["loss"].shape) == ((16, 3, 256, 256), (1,))
    assert (names["weights"].keys(), names["caption"]) == ({"weight"}, "a")
    assert names["norm"] > 0.1 and Path("a.mp4").is_file() and not names["log"].close()
    assert torch.nn.utils.get_total_norm([each.grad for each in names["model"].parameters()]) <= 0.1
    capsys.readouterr()
    exec(lines, names)  # noqa: S102
    assert re.fullmatch(
        r"(\(step=000000[123]\) Train Loss: \d\.\d{4}, Gradient Norm: \d+\.\d{4}, Train Steps/Sec: \d+\.\d\d\n){3}",
        capsys.readouterr().out,
    )


def test_keys_of_the_page_are_those_of_the_converter() -> None:
    reasons = {key: f": {reason}" for key, reason in (REMARKS | OMITTED).items()}
    ours = {f"`{key}`": f"`{new}`{reasons.get(key, '')}" for key, new in RENAMED.items()}
    ours |= {f"`{key}`": f"dropped: {reason}" for key, reason in DROPPED.items()}
    text = {f"`{key}`": f"`{new}`" for key, new in TEXT_RENAMED.items() if new != key}
    text |= {f"`{key}`": f"dropped: {reason}" for key, reason in TEXT_DROPPED.items()}
    classes, others = section("Keys of the YAML files").split("`configs/t2x/*.yaml` keep")
    classes, extras = classes.split("\n| value of `extras`")
    extras = f"| value of `extras`{extras}"
    assert dict(table(classes)) == ours and dict(table(others)) == text
    for value, said in table(extras):
        official = {"model": "Latte-S/2", "num_classes": 7, "extras": int(value) if value.isdigit() else 5}
        if said.startswith("refused"):
            with pytest.raises(ValueError, match=r"^extras: "):
                translate_config(official)
        else:
            sections, _ = translate_config(official)
            assert ("num_classes" in sections["model"]) == said.startswith("class-conditional")


def test_run_folder_and_metrics_of_the_page(finished: Path) -> None:
    here = " ".join(cells[-1] for cells in table(section("Run folder and log")))
    row = read_rows(finished / "metrics.jsonl")[0]
    names = set(re.findall(r"`([^`]+)`", here))
    assert {name for name in names if not (finished / name).exists() and name not in row} == {"2>&1", "step-0010000"}
    official = {"fid50k_full", "kid50k_full", "is50k", "fvd2048_16f", "fvd2048_128f", "fvd2048_128f_subsample8f"}
    metrics = [cells[0].strip("`") for cells in table(section("Metrics"))]
    assert set(metrics) == official | {"isv2048_ucf", "fid50k", "kid50k"}
    assert [parse_metric(name).name for name in metrics] == metrics


def test_official_scripts_and_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(section("Commands and flags"))
    for official, _ in rows:
        for script in re.findall(r"[\w/]+\.(?:py|sh|slurm)\b", official):
            assert (ROOT / script).is_file()
            flags = set(re.findall(r"--\w+", official)) - {"--nproc_per_node", "--save_ceph"}
            if main := MAINS.get(script.removesuffix(".py").replace("/", ".")):
                assert call(main, "--help")[0] == 0
                assert flags <= set(re.findall(r"--\w+", capsys.readouterr().out))
    code, said = call(MAINS["sample.sample_ddp"], "--save_ceph")
    assert code == 2 and said.startswith("error: --save_ceph: this official flag wrote to the authors' own storage")
