"""Configuration, launch arguments and evaluation: faults G1 to G3, G8 to G10, H5 and H7."""

import dataclasses
import json
import math
import operator
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train
import train_with_img
from datasets.build import build_dataset
from datasets.config import MAX_TIMEOUT_S, DataConfig
from engine import memory
from engine.build import build_model, count_parameters
from engine.config import Config, load_config
from engine.keys import DROPPED, RENAMED
from sample import sample
from tests.fault_support import ROOT, Job, call, little_memory
from tools import plan


def at(config: Config, key: str) -> typing.Any:
    return operator.attrgetter(key)(config)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.learnig_rate", "optim.learning_rate"),
        ("learnig_rate", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("model.varient", "model.variant"),
        ("optim.batch_size", "batch_size"),
    ],
)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_G1_misspelt_key(tmp_path: Path, key: str, meant: str, place: str) -> None:
    section, _, leaf = key.rpartition(".")
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({section: {leaf: 1}} if section else {leaf: 1}))  # JSON is YAML
    arguments = ["--config", str(file)] if place == "file" else [f"{key}=1"]
    for main in (train.main, train_with_img.main):
        code, said = call(main, *arguments, f"train.output_dir={tmp_path / 'run'}")
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert f"unknown key '{key}'" in said and f"{meant}'" in said.replace(" here", "' here")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [train.main, sample.main])
def test_G1_misspelt_flag(main: Callable[[list[str]], int]) -> None:
    code, said = call(main, "--learnig_rate", "1")
    assert code == 2 and "--learnig_rate" in said


VALUES = ("-5", "0", "nan", "1.5", ".inf", "no")


def numeric_keys(owner: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every key whose value is a number or a switch, with the kind."""
    hints = typing.get_type_hints(owner)
    for item in dataclasses.fields(owner):
        kinds = {hints[item.name], *typing.get_args(hints[item.name])}
        if dataclasses.is_dataclass(hints[item.name]):
            yield from numeric_keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
        for kind in (bool, int, float):
            if kind in kinds:
                yield f"{prefix}{item.name}", kind


# what is right although it is on the list: values of a kind of key, and then those of single keys
RIGHT_KINDS: dict[type, set[str]] = {bool: {"0", "no"}, int: set(), float: {"1.5"}}
ZERO = (
    "model.num_classes model.label_dropout model.label_init_std data.num_images data.num_workers data.max_unusable "
    "codec.shift optim.weight_decay optim.beta1 optim.beta2 optim.warmup_steps optim.min_learning_rate "
    "optim.clip_start_step optim.spike_factor train.ema_decay train.keep_last train.keep_every train.seed "
    "train.drift_check_every train.hang_timeout_s sample.seed sample.eta data.val_share monitor.val_every "
    "monitor.sample_every monitor.metric_every lora.rank train.temporal_ramp_steps objective.features_block "
    "objective.features_until"
)  # a switch, a first seed, or no effect: as the comment at each key says
BELOW = (
    "model.label_dropout data.max_unusable data.val_share optim.beta1 optim.beta2 optim.min_learning_rate "
    "train.ema_decay sample.eta condition.probability text.caption_dropout"
)
# read only with another key that is not set here, so nothing but their defaults is right
ALONE = (
    "text.clean_captions lora.alpha sample.lora_scale diffusion.min_snr_gamma objective.route_keep "
    "objective.sync_weight objective.features_weight"
)
RIGHT_KEYS: dict[str, set[str]] = {"codec.shift": {"-5"}}  # latents may be shifted either way


def right_values(key: str, kind: type) -> set[str]:
    right = RIGHT_KINDS[kind] | RIGHT_KEYS.get(key, set())
    right |= {"0"} if key in ZERO.split() else set()
    right -= {"1.5"} if key in BELOW.split() else set()  # at most 1, or at most another key
    if key in ALONE.split():
        return set()
    if key == "sample.guidance_scale":  # guidance needs classes
        right -= {"1.5"}
    return right


def test_G2_the_table_names_keys_that_there_are() -> None:
    keys = dict(numeric_keys())
    assert len(keys) >= 55
    assert not {*ZERO.split(), *BELOW.split(), *ALONE.split(), *RIGHT_KEYS} - set(keys)


def find_problem(key: str, kind: type, value: str, *arguments: typing.Any) -> str | None:
    """Returns the mistake of `load_config(*arguments)` about `key: value`, or None."""
    right = value in right_values(key, kind)
    try:
        given = at(load_config(*arguments), key)
    except ValueError as error:
        named = key in str(error) and "\n" not in str(error)
        return None if named and not right else f"{key}={value} is refused: {error}"
    taken = right and type(given) is kind and math.isfinite(float(given))
    return None if taken else f"{key}={value} is taken, as {given!r}"


@pytest.mark.parametrize("value", VALUES)
def test_G2_every_number_and_switch(value: str) -> None:
    """Each value at each key: refused by name, or one that is right there."""
    keys = [(key, kind) for key, kind in numeric_keys() if kind is float or value not in ("nan", ".inf")]
    found = [find_problem(key, kind, value, None, [f"{key}={value}"]) for key, kind in keys]
    assert [each for each in found if each] == []


@pytest.mark.parametrize("value", [*VALUES, "abc"])
def test_G2_in_a_file(value: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    keys = dict(numeric_keys())
    for key in ("train.batch_size", "train.seed", "optim.learning_rate", "codec.shift", "train.compile"):
        section, _, leaf = key.partition(".")
        file.write_text(f"{section}:\n  {leaf}: {value}\n")
        assert find_problem(key, keys[key], value, file) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.seed", 2**63), ("sample.seed", 2**64), ("train.seed", -1), ("sample.seed", -1), ("train.seed", "1e3")],
)
def test_G2_seeds_that_no_generator_takes(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize("value", ["no", "off", "yes", "true", "[a]", "{a: 1}"])
def test_G2_words(value: str) -> None:
    """YAML turns `no` into false; a key that takes a word says so instead of storing 'False'."""
    for key in ("train.precision", "train.output_dir", "data.path", "sample.ckpt", "model.name"):
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize("key", sorted({*RENAMED, *DROPPED} - {"model"}))
def test_G3_official_key_in_a_config_of_ours(tmp_path: Path, key: str) -> None:
    """Never ignored: refused, with its new name where it has one, with the reason where it has none."""
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({key: 1}))
    with pytest.raises(ValueError, match=rf"a\.yaml: unknown key '{key}'") as error:
        load_config(file)
    assert RENAMED.get(key, DROPPED.get(key, "?")) in str(error.value)


def test_G9_settings_that_work(checkpoint: Path, tmp_path: Path) -> None:
    """Seed 0 is a seed like any other, not "none given"; a guidance of 1 is none, 0 is another."""
    made = {}
    for flags in ("", "--seed 0", "--seed 1", "--guidance_scale 1", "--guidance_scale 3", "--guidance_scale 0"):
        folder = tmp_path / flags
        fixed = ["--ckpt", str(checkpoint), "--save_video_path", str(folder), "--num_videos", "1", "--steps", "3"]
        assert sample.main([*fixed, "--device", "cpu", *flags.split()]) == 0
        (made[flags],) = (file.read_bytes() for file in folder.glob("*.mp4"))
    default = made.pop("")
    assert [flags for flags, video in made.items() if video == default] == ["--seed 0", "--guidance_scale 1"]
    assert len({*made.values()}) == 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", str(2**70)], "sample.seed must be zero or more and below"),
        (["--seed", "1.5"], "--seed"),
        (["--guidance_scale", "nan"], "sample.guidance_scale must be zero or more and finite"),
        (["--steps", "0"], "sample.steps must be at least 1"),
        (["--num_videos", "0"], "sample.num_videos must be at least 1"),
        (["--device", "tpu9"], "this machine has no such device"),
        (["--labels", "2"], "label 2 is out of range; the network has 2 classes"),
        (["--labels", "-1"], "label -1 is out of range"),
        (["--labels", "sinks"], "'sinks' is not a class of this network; its classes are falls, rises"),
    ],
)
def test_G9_settings_that_are_refused(checkpoint: Path, tmp_path: Path, flags: list[str], sentence: str) -> None:
    code, said = call(sample.main, "--ckpt", str(checkpoint), "--save_video_path", str(tmp_path / "out"), *flags)
    assert code == 2 and sentence in said, said
    assert not list(tmp_path.rglob("*.mp4"))


# imported by every Python that finds it: no network, no GPU, and none of the packages that are absent
BARE = """
import importlib.abc, socket, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
def refuse(*arguments, **_):
    raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
# optional or slow to import: --help needs none of them
NOT_FOR_HELP = """
    diffusers transformers peft lightning accelerate decord tensorboard matplotlib psutil torchao bitsandbytes
""".split()  # noqa: SIM905
PACKAGES = ("tools", "benchmarks", "demo")  # started as modules; other scripts by path
COMMANDS = sorted(
    str(file.relative_to(ROOT))
    for pattern in ("*.py", "sample/*.py", "tools/*.py", "tools/*/__main__.py", "benchmarks/__main__.py", "demo/*.py")
    for file in ROOT.glob(pattern)
    if 'if __name__ == "__main__"' in file.read_text()
)
# `--help` of every command, each in a fork of a process that has imported what is not ours
EVERY_HELP = """
import json, os, runpy, sys
import train, tools.calc_metrics_for_dataset
for name in [name for name in sys.modules if os.path.isdir(name.partition(".")[0])]:
    del sys.modules[name]
for file in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        sys.argv = [file, "--help"]
        if file.startswith(("tools", "benchmarks", "demo")):
            runpy.run_module(file.removesuffix(".py").removesuffix("/__main__").replace("/", "."), run_name="__main__")
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(file))
            runpy.run_path(file, run_name="__main__")
        os._exit(99)  # it did not exit
    print("ENDED", file, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def bare_machine(folder: Path, absent: list[str]) -> dict[str, str]:
    """Variables with which Python finds no `absent` package, no network, no GPU, no token."""
    (folder / "sitecustomize.py").write_text(BARE % (tuple(absent),))
    none = dict.fromkeys([key for key in os.environ if key.startswith(("HF_", "HUGGING", "WANDB"))], "")
    return {**none, "PYTHONPATH": str(folder), "HOME": str(folder)}


def test_G10_help(tmp_path: Path) -> None:
    assert len(COMMANDS) > 20
    with Job([sys.executable, "-c", EVERY_HELP, json.dumps(COMMANDS)], **bare_machine(tmp_path, NOT_FOR_HELP)) as job:
        code, output = job.wait(280)
    assert code == 0, output
    *texts, _ = re.split(r"^ENDED .*\n", output, flags=re.MULTILINE)
    assert all("usage" in text.lower() for text in texts), output
    assert re.findall(r"^ENDED (.*)", output, re.MULTILINE) == [f"{file} 0" for file in COMMANDS], output


@pytest.mark.parametrize("command", [["train.py", "data.path=/nowhere"], ["-m", "tools.convert", "config", "a.yaml"]])
def test_G10_a_missing_package_ends_in_one_sentence(tmp_path: Path, command: list[str]) -> None:
    with Job([sys.executable, *command], **bare_machine(tmp_path, ["torch"])) as job:
        code, output = job.wait(60)
    assert code == 2
    assert output == "error: the Python package 'torch' is not installed: `make setup` installs everything.\n"


def test_G10_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: list[str]) -> None:
        import pre_commit  # type: ignore[import-not-found] # noqa: F401

    monkeypatch.setitem(sys.modules, "pre_commit", None)
    code, said = call(main)
    assert code == 2 and "'pre_commit' is not installed" in said and "pip install '.[dev]'" in said


def test_G10_a_missing_reader(frame_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match=r"data\.reader=decord needs the Python package 'decord'.*pip install decord"):
        build_dataset(DataConfig(path=str(frame_folders), num_frames=4, frame_interval=1, reader="decord"), seed=0)
    assert len(build_dataset(DataConfig(path=str(frame_folders), num_frames=4, frame_interval=1), seed=0))


def test_G10_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.distributed import init_world
    from sample.generate import usable_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert init_world().device.type == "cpu" and usable_device(None).type == "cpu"
    with pytest.raises(ValueError, match="no such device"):
        usable_device("cuda")


SIZES = {"name": "custom", "hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 2}
CUSTOM = [f"model.{key}={value}" for key, value in SIZES.items()]


@pytest.mark.parametrize(
    "key",
    ["model.hidden_size", "model.num_classes", "model.depth", "data.image_size", "data.num_frames", "data.num_workers"],
)
def test_H5_sizes_beyond_any_machine(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}.* at most [\d,]+"):
        load_config(None, [*CUSTOM, f"{key}={10**9}"])


@pytest.mark.parametrize("key", ["train.timeout_s", "train.hang_timeout_s", "data.worker_timeout_s"])
def test_H5_timeouts_that_overflow(key: str, tmp_path: Path) -> None:
    """A year is taken where it is waited for; more is refused."""
    import faulthandler
    from datetime import timedelta

    with pytest.raises(ValueError, match=rf"{key}.*at most {MAX_TIMEOUT_S:.0f} \(a year\)"):
        load_config(None, [f"{key}=1e300"])
    assert at(load_config(None, [f"{key}={MAX_TIMEOUT_S}"]), key) == MAX_TIMEOUT_S
    with (tmp_path / "stacks").open("w") as stream:
        faulthandler.dump_traceback_later(MAX_TIMEOUT_S, file=stream)
        faulthandler.cancel_dump_traceback_later()
    assert timedelta(seconds=MAX_TIMEOUT_S)


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["model.variant=sequential", "model.injection=tokens", "model.num_classes=7", "model.depth=3"],
        ["model.variant=parallel", "model.label_dropout=0", "model.num_classes=5"],
        ["model.patch_embedding=tubelet", "model.depth=6"],
        ["model.variant=image", "data.num_frames=1", "model.depth=3"],
        ["model.name=custom-t2v", "data.name=captions", "model.depth=6"],
        ["model.name=custom-t2i", "data.name=captions", "data.num_frames=1", "model.depth=3"],
        ["model.name=Latte-1", "data.name=captions", *(f"model.{key}=null" for key in memory.SIZE_KEYS)],
    ],
)
def test_H5_no_network_has_fewer_parameters_than_are_counted(keys: list[str]) -> None:
    config = load_config(None, [*CUSTOM, *keys])
    parameters = count_parameters(build_model(config, "meta"))
    assert 0.2 * parameters < memory.count_least(config)[0] < parameters


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["model.hidden_size=16384"], r"model.name=custom \(hidden_size=16384, depth=2, num_heads=2, patch_size=2\)"),
        (["model.num_classes=16000000"], "model.num_classes=16000000"),
        (["model.depth=200", "model.hidden_size=2048"], "depth=200"),
        (["data.image_size=16384", "model.hidden_size=1024"], "data.num_frames=16, data.image_size=16384"),
        (["data.num_frames=65536", "model.hidden_size=256"], "data.num_frames=65536, data.image_size=256"),
    ],
)
def test_H5_what_does_not_fit_is_refused_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch, keys: list[str], named: str
) -> None:
    monkeypatch.setattr(memory, "find_memory", lambda device: 2**30)
    config = load_config(None, [*CUSTOM, *keys])
    monkeypatch.setattr("engine.build.Latte", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match=rf"needs at least [\d,.]+ GiB of memory, and cpu has 1.0 GiB.*{named}"):
        build_model(config)


def test_H5_training_takes_more_than_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty bytes a parameter, of which a sharded one keeps a share; four of adapters' base; inputs of layers."""
    config = load_config(None, ["train.precision=bf16"])
    parameters, width, tokens = 28 * 12 * 1152**2, 1152, 16 * 16 * 16
    need = 20 * parameters + 12 * width * (16 * 16 + 16) + 2 * 5 * 28 * width * tokens
    for size, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(memory, "find_memory", lambda device, size=size: size)
        if fits:
            memory.check_training_fits(config, "cuda:0")
            continue
        with pytest.raises(ValueError, match=r"training needs at least 9.5 GiB of memory, and cuda:0 has 9.5 GiB"):
            memory.check_training_fits(config, "cuda:0")
        for keys in (["train.parallel=fsdp"], ["lora.rank=1", "train.init_from=a.pt"]):
            memory.check_training_fits(load_config(None, keys, base=config.to_dict()), "cuda:0", ranks=2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ValueError, match=r"data\.num_workers=25 is more than the 24"):
        memory.check_training_fits(load_config(None, ["data.num_workers=25"]), "cpu")


def test_H5_memory_is_that_of_the_machine_or_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(memory, "LIMIT_FILES", ("/nowhere",))
    whole = memory.find_memory(torch.device("cpu"))
    assert whole == pytest.approx(psutil.virtual_memory().total, rel=1e-3)
    for text, size in (("max", whole), (str(2**20), 2**20), (str(2**63), whole)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(memory, "LIMIT_FILES", ("/nowhere", str(tmp_path / "limit")))
        assert memory.find_memory(torch.device("cpu")) == size


LARGE = "data.image_size=16384"
TEXT = ["model.name=custom-t2v", "data.name=captions"]


@pytest.mark.parametrize(
    ("main", "keys", "sentence"),
    [
        (train.main, ["model.hidden_size=65536", "model.depth=256"], "training needs at least"),
        (
            train.main,
            ["--dry-run", LARGE, "data.num_frames=65536", "model.hidden_size=65536"],
            "network needs at least",
        ),
        (train.main, ["--dry-run", LARGE, "codec.downsample_factor=1", "model.hidden_size=8"], "too many for spatial"),
        (plan.main, [*TEXT, LARGE, "model.hidden_size=8192"], "lower data.image_size=16384"),
    ],
)
def test_H5_command_lines_end_at_once(
    frame_folders: Path, tmp_path: Path, main: Callable[[list[str]], int], keys: list[str], sentence: str
) -> None:
    data = ["data.num_workers=0", "data.num_frames=64", "data.frame_interval=1", f"data.path={frame_folders}"]
    with little_memory(6 * 2**30):
        code, said = call(main, *CUSTOM, "train.batch_size=2", *data, *keys, f"train.output_dir={tmp_path / 'run'}")
    assert code == 2 and sentence in said and said.count("\n") == 1, said


def test_H5_sampling_from_a_file_of_keys(tmp_path: Path) -> None:
    """An official-like file with a YAML that says an absurd network."""
    weights, config = tmp_path / "a.pt", tmp_path / "a.yaml"
    torch.save({"x": torch.zeros(1)}, weights)
    for size, sentence in ((10**9, "at most 65,536"), (65536, "network needs at least")):
        config.write_text(json.dumps({"model": {**SIZES, "hidden_size": size}}))
        with little_memory(6 * 2**30):
            code, said = call(sample.main, "--config", str(config), "--ckpt", str(weights), "--device", "cpu")
        assert code == 2 and sentence in said.splitlines()[-1], said


@pytest.mark.parametrize(
    ("file", "what"), [("", "is a folder"), ("/dev/null", "is a device"), ("no", "does not exist")]
)
def test_H5_config_that_is_no_file(tmp_path: Path, file: str, what: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"config file .* {what}.*name a YAML file"):
        load_config(tmp_path / file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.max_steps", "1:30"), ("train.batch_size", "010"), ("train.batch_size", "+010"),
        ("optim.learning_rate", "1:30.5"), ("train.timeout_s", "20:30:00"), ("sample.labels", "[a, 010]"),
        ("data.path", "010"),
    ],
)  # fmt: skip
def test_H9_numbers_of_base_8_and_60(tmp_path: Path, key: str, value: str) -> None:
    """Refused from the command line and from files, with the line; YAML itself takes them for other numbers."""
    section, _, leaf = key.partition(".")
    with pytest.raises(ValueError, match=rf"the value of {key}: YAML reads .* in base 8 or 60"):
        load_config(None, [f"{key}={value}"])
    file = tmp_path / "a.yaml"
    file.write_text(f"{section}:\n  {leaf}: {value}\n")
    with pytest.raises(ValueError, match=r"a\.yaml, line 2: YAML reads .* in base 8 or 60"):
        load_config(file)


@pytest.mark.parametrize("text", ["'010'", '"1:30"', "/data/010", "runs/1:30", "12:30:at_noon", "a010", "0:30", "08"])
def test_H9_words_that_look_like_them(tmp_path: Path, text: str) -> None:
    word = text.strip("'\"")
    config = load_config(None, [f"data.path={text}", "train.max_steps=1_000", "optim.learning_rate=1e-3"])
    assert (config.data.path, config.train.max_steps, config.optim.learning_rate) == (word, 1000, 1e-3)
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "a.yaml") == config
