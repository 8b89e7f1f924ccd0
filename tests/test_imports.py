"""The arrows between folders, read off the syntax trees."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.latent_support import cache, save_codec

ROOT = Path(__file__).resolve().parents[1]
OURS = {"common", "models", "diffusion", "datasets", "engine", "sample", "evaluation", "benchmarks", "demo", "tools"}


def module_graph() -> dict[str, set[str]]:
    """Returns the imports between modules of ours, those in functions and under TYPE_CHECKING included."""
    found_files = [*ROOT.glob("train*.py"), *(file for top in OURS for file in (ROOT / top).rglob("*.py"))]
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in found_files}
    files = {name.removesuffix(".__init__"): file for name, file in dotted.items()}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(file.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                parent = ".".join([*base, *([node.module] if node.module else [])])
                inner = [f"{parent}.{alias.name}" for alias in node.names]
                found = [each if each in files else parent for each in inner]
            graph[name] |= {each for each in found if each in files and each != name}
    return graph


def folder_of(module: str) -> str:
    return "train" if module.startswith("train") else module.split(".")[0]


def test_the_drawing_shows_the_imports_between_folders() -> None:
    """Each arrow of docs/architecture.md is an import, and each import lies along arrows."""
    lines = re.findall(r"^ +(\w+)(?:\[.*\])? --> (\w+)$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    imports: dict[str, set[str]] = {folder: set() for folder in OURS | {"train"}}
    for module, targets in module_graph().items():
        imports[folder_of(module)] |= {folder_of(target) for target in targets} - {folder_of(module)}
    below: dict[str, set[str]] = {"common": set()}
    for folder in reversed([folder for folder, _ in lines]):  # lower folders come last
        arrows = {target for source, target in lines if source == folder}
        below[folder] = arrows.union(*(below[target] for target in arrows))
        assert arrows <= imports[folder] <= below[folder], folder
    assert below.keys() == imports.keys() and not imports["common"]


def test_no_circle_of_imports() -> None:
    """A circle that only the type checker sees counts as one."""
    try:
        TopologicalSorter(module_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' <- '.join(error.args[1])}")


HEAVY = {"transformers", "peft", "diffusers", "accelerate", "sentencepiece"}
CODE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Blocker())
import train, engine.trainer, models.latte_t2v
from sample import generate, sample
assert not {"tensorboard", "matplotlib", "decord"} & sys.modules.keys()
for arguments in TRAININGS:
    assert train.main(arguments) == 0
assert sample.main(SAMPLING) == 0
del sys.meta_path[0]
import datasets, diffusers, transformers
print(datasets.__file__)
"""


def test_a_class_conditional_run_needs_no_text_encoder(tiny: list[str], tmp_path: Path) -> None:
    """Training from pixels and from latents of a diffusers autoencoder, and sampling; `datasets` is ours."""
    codec = save_codec(tmp_path / "codec", "AutoencoderKL")
    cached = [*codec, f"data.latents={cache([*tiny, *codec], tmp_path / 'latents')}"]
    common = [*tiny, "train.max_steps=1"]
    trainings = [common, [*common, *cached, f"train.output_dir={tmp_path / 'cached'}"]]
    sampling = ["--ckpt", str(tmp_path / "run"), "--num_videos", "1", "--save_video_path", str(tmp_path / "out")]
    values = f"HEAVY, TRAININGS, SAMPLING = {HEAVY!r}, {trainings!r}, {[*sampling, 'sample.steps=2']!r}\n"
    command = [sys.executable, "-c", values + CODE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.splitlines()[-1]).parent == ROOT / "datasets"
