"""The arrows between folders, read off the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"models", "diffusion", "datasets", "engine", "sample", "evaluation", "benchmarks", "demo", "tools"}
ALLOWED = {
    "models": set(),
    "diffusion": set(),
    "datasets": set(),
    "engine": {"models", "diffusion", "datasets"},
    "sample": OURS - {"evaluation", "benchmarks", "demo"},
    "evaluation": OURS - {"benchmarks", "demo", "tools"},
    "benchmarks": OURS,
    "demo": OURS,
    "tools": OURS,
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


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = ["transformers", "peft", "diffusers", "accelerate", "sentencepiece", "tensorboard", "matplotlib", "decord"]


@pytest.mark.parametrize("modules", ["train, engine.trainer, sample.generate", "models, models.latte_t2v"])
def test_training_and_sampling_import_no_text_encoder(modules: str) -> None:
    """A class-conditional run pays for neither T5 nor a pipeline, and the text network itself needs neither."""
    code = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


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


def test_our_datasets_folder_is_the_one_imported() -> None:
    code = "import datasets, diffusers, transformers; print(datasets.__file__)"
    assert Path(run_python(code).strip()).parent == ROOT / "datasets"


BY_PATH = [ROOT, ROOT / "sample"]  # started by path; all others as `python -m folder.module`
WORKERS = {"benchmarks/memory.py", "benchmarks/scaling.py"}  # started by a benchmark, with JSON as their argument
COMMANDS = sorted(
    str(file.relative_to(ROOT))
    for folder in (*BY_PATH, ROOT / "evaluation", ROOT / "benchmarks", ROOT / "demo", ROOT / "tools")
    for file in folder.glob("*.py")
    if 'if __name__ == "__main__"' in file.read_text() and str(file.relative_to(ROOT)) not in WORKERS
)
# Slow libraries, which `--help` does not load.
SLOW = {"transformers", "peft", "diffusers", "lightning", "matplotlib"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_slow_library(command: str) -> None:
    by_path = (ROOT / command).parent in BY_PATH
    module = command.removesuffix("/__main__.py").removesuffix(".py").replace("/", ".")
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *([command] if by_path else ["-m", module]), "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "usage" in result.stdout.lower()
    loaded = {line.rpartition("| ")[2].strip() for line in result.stderr.splitlines()}
    assert not loaded & SLOW
