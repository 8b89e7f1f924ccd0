"""The arrows between folders, read off the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"common", "models", "diffusion", "datasets", "engine", "sample", "evaluation", "benchmarks", "demo", "tools"}
ALLOWED = {
    "common": set(),
    "models": {"common"},
    "diffusion": {"common"},
    "datasets": {"common"},
    "engine": {"common", "models", "diffusion", "datasets"},
    "sample": OURS - {"evaluation", "benchmarks", "demo", "tools"},
    "evaluation": OURS - {"benchmarks", "demo", "tools"},
    "demo": OURS - {"tools", "benchmarks"},
    "tools": OURS - {"benchmarks"},
    "benchmarks": OURS,
}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_only_what_the_design_allows(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        strangers = (imported(file) & OURS) - ALLOWED[folder] - {folder}
        assert not strangers, f"{file.relative_to(ROOT)} imports {strangers}"


def test_the_drawing_shows_the_imports_between_folders() -> None:
    """Each arrow of docs/architecture.md is an import, and each import lies along arrows."""
    lines = re.findall(r"^ +(\w+)(?:\[.*\])? --> (\w+)$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    below: dict[str, set[str]] = {}
    for folder in reversed([folder for folder, _ in lines]):  # lower folders come last
        arrows = {target for source, target in lines if source == folder}
        files = ROOT.glob("train*.py") if folder == "train" else (ROOT / folder).rglob("*.py")
        imports = set().union(*map(imported, files)) & OURS - {folder}
        below[folder] = arrows.union(*(below.get(target, set()) for target in arrows))
        assert arrows <= imports <= below[folder], folder
    assert below.keys() | {"common"} == OURS | {"train"}


def module_graph() -> dict[str, set[str]]:
    """Returns the imports between modules of ours, those in functions and under TYPE_CHECKING included."""
    found_files = [file for top in OURS for file in (ROOT / top).rglob("*.py")]
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


def test_no_circle_of_imports() -> None:
    """A circle that only the type checker sees counts as one."""
    try:
        TopologicalSorter(module_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' <- '.join(error.args[1])}")


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = ["transformers", "peft", "diffusers", "accelerate", "sentencepiece", "tensorboard", "matplotlib", "decord"]


def test_training_and_sampling_import_no_text_encoder() -> None:
    """Neither T5 nor a pipeline; the text network itself needs neither. The folder `datasets` that is found is ours."""
    code = "import sys, train, engine.trainer, sample.generate, models.latte_t2v\n"
    code += f"print([name for name in {HEAVY} if name in sys.modules])\n"
    code += "import datasets, diffusers, transformers; print(datasets.__file__)"
    found, place = run_python(code).splitlines()
    assert found == "[]" and Path(place).parent == ROOT / "datasets"


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"transformers", "peft", "diffusers", "accelerate", "sentencepiece"}:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Blocker())
"""


def test_a_class_conditional_run_needs_none_of_them(tiny: list[str], tmp_path: Path) -> None:
    """Training from pixels and from latents of a diffusers autoencoder, and sampling, with all of them barred."""
    from tests.latent_support import cache, save_codec

    codec = save_codec(tmp_path / "codec", "AutoencoderKL")
    cached = [*tiny, *codec, f"data.latents={cache([*tiny, *codec], tmp_path / 'latents')}"]
    steps = ["train.max_steps=1", f"train.output_dir={tmp_path / 'cached'}"]
    sample = ["--ckpt", str(tmp_path / "run"), "--num_videos", "1", "--save_video_path", str(tmp_path / "out")]
    code = (
        f"{BLOCKED}\nimport train\nfrom sample import sample\n"
        f"assert train.main({[*tiny, steps[0]]!r}) == 0\nassert train.main({[*cached, *steps]!r}) == 0\n"
        f"assert sample.main({[*sample, 'sample.steps=2']!r}) == 0\n"
    )
    run_python(code)
