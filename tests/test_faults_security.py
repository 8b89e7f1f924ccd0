"""Hostile files: fault tests D1 to D14. Payloads only make a folder, and each test asserts that they did not."""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import train
from common.text import printable
from datasets.build import build_catalog, build_dataset
from datasets.config import DataConfig
from datasets.labels import read_frame_list
from datasets.readers import VideoError, open_video
from engine.build import build_model
from engine.checkpoint import MANIFEST, Checkpoint, CheckpointError, find_checkpoint, load_checkpoint
from engine.checkpoint import save_checkpoint as write_checkpoint
from engine.conditions import class_conditions
from engine.config import MAX_YAML_CHARACTERS, load_config
from engine.keys import translate_config
from engine.weights import load_model_weights
from evaluation.detectors import load_detector
from models.autoencoder import CodecConfig, LatentCodec
from models.convert import extract_weights, read_state_dict
from models.taef2 import DECODER_FILE, ENCODER_FILE, Taef2
from sample.generate import Generator, sampler_settings
from sample.sample import Request, write_samples
from sample.source import Source
from sample.video_io import slug, write_mp4
from tests.conftest import TINY
from tests.detector_stubs import write_stub
from tests.fault_support import ROOT, call, make, run, seal
from tools import convert, prepare_dataset
from tools.unpack import unpack

NASTY = ["../../out", "a\nb", "\x1b[31mred\x1b[0m", "/etc/passwd", "..", "caf\u00e9 \u202egnp"]


@contextlib.contextmanager
def cheap(most: float = 50e6, seconds: float = 60.0) -> Iterator[None]:
    """Checks that the block takes little memory, in bytes, and little time of the CPU."""
    process = psutil.Process()
    before, start = process.memory_info().rss, time.process_time()
    yield
    assert time.process_time() - start < seconds and process.memory_info().rss - before < most


def refuses(match: str, read: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match) as error:
        read()
    assert "\n" not in str(error.value)


def open_codec(folder: Path, **settings: Any) -> LatentCodec:
    return LatentCodec.from_config(CodecConfig(path=str(folder), **settings))


class Call:
    """Pickles as the call `function(*arguments)`: what runs when it is loaded."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def payloads(marker: Path) -> dict[str, Any]:
    make = Call(os.mkdir, str(marker))
    return {
        "system call": make,
        "eval": Call(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "nested loader": Call(pickle.loads, pickle.dumps(make)),
        "nested torch.load": Call(torch.load, "inner.pt"),
        "process": Call(subprocess.Popen, ["mkdir", str(marker)]),
        "import": Call(__import__, "this"),
    }


PAYLOADS = sorted(payloads(Path()))


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_D1_payload_in_a_checkpoint(tmp_path: Path, kind: str, form: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "bad.pt"
    content = {"ema": {"w": torch.ones(2)}, "note": payloads(marker)[kind]}
    if form == "bare pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    for read in (read_state_dict, load_model_weights, lambda path: Source.open(path).weights("ema")):
        refuses(r"bad\.pt (holds Python objects|is not a complete)", lambda read=read: read(file))  # type: ignore[misc]
    assert not marker.exists()


def test_D1_the_payloads_are_live(tmp_path: Path) -> None:
    """Positive control: a loader that trusts its input runs them."""
    for number, kind in enumerate(("system call", "eval", "nested loader")):
        marker = tmp_path / str(number)
        pickle.loads(pickle.dumps(payloads(marker)[kind]))
        assert marker.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights", ENCODER_FILE, "rng.safetensors"])
def test_D1_payload_in_other_files(tmp_path: Path, name: str) -> None:
    """Weights of any name, a codec's, and a file of a checkpoint of ours, where nothing is a pickle."""
    marker, folder = tmp_path / "ran", tmp_path
    read: Callable[[], Any] = partial(read_state_dict, tmp_path / name)
    content = {"w": torch.ones(2), "x": payloads(marker)["eval"]}
    if name == ENCODER_FILE:
        content |= Taef2().encoder.state_dict()
        torch.save(Taef2().decoder.state_dict(), tmp_path / DECODER_FILE)
        read = partial(open_codec, tmp_path, latent_channels=32)
    elif name == "rng.safetensors":
        folder = whole_checkpoint(tmp_path)
        read = partial(load_checkpoint, folder)
    torch.save(content, folder / name)
    if folder != tmp_path:
        seal(folder)
    refuses(name, read)
    assert not marker.exists()


def with_settings(file: Path, settings: Any) -> str:
    """Writes an official checkpoint with weights and `settings`; returns the SHA-256."""
    torch.save({"model": {"w": torch.zeros(2)}, "ema": {"module.w": torch.ones(2)}, "args": settings}, file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


SETTINGS = {
    "Namespace": argparse.Namespace(lr=1e-4, betas=[0.9, 0.99], inner=argparse.Namespace(a=None)),
    "config": OmegaConf.create({"model": {"name": "Latte-XL/2"}, "sizes": [1, 2], "on": True, "x": 0.5}),
}


@pytest.mark.parametrize(("kind", "output"), [("Namespace", "official"), ("config", "mine")])
def test_D2_settings_are_refused_with_advice_that_works(tmp_path: Path, kind: str, output: str) -> None:
    file, written = tmp_path / "official.pt", tmp_path / f"{output}.safetensors"
    digest = with_settings(file, SETTINGS[kind])
    with pytest.raises(ValueError, match=r"python -m tools\.convert checkpoint`.*SHA-256"):
        read_state_dict(file)
    flags = ["--output", str(written)] if output == "mine" else []
    assert convert.main(["checkpoint", str(file), "--sha256", digest.upper(), *flags]) == 0
    weights = read_state_dict(written)
    assert list(weights) == ["w"] and torch.equal(weights["w"], torch.ones(2))


def test_D2_only_a_listed_hash_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "official.pt"
    digest = with_settings(file, SETTINGS["Namespace"])
    wrong = hashlib.sha256(b"another").hexdigest()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=f"not opened: its SHA-256 is {digest}, but --sha256 allows {wrong}"):
        convert.main(["checkpoint", str(file), "--sha256", wrong])
    with pytest.raises(SystemExit):
        convert.main(["checkpoint", str(file)])
    assert not (tmp_path / "official.safetensors").exists()


@pytest.mark.parametrize("kind", PAYLOADS)
def test_D2_the_convert_command_runs_nothing_even_with_the_hash(tmp_path: Path, kind: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "official.pt"
    digest = with_settings(file, argparse.Namespace(a=payloads(marker)[kind]))
    with pytest.raises(ValueError, match="Python objects"):
        convert.main(["checkpoint", str(file), "--sha256", digest])
    assert not marker.exists() and not (tmp_path / "official.safetensors").exists()


def test_D2_settings_are_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the classes on the list are called: stand-ins take their place."""
    digest = with_settings(tmp_path / "official.pt", argparse.Namespace(a=1))
    monkeypatch.setattr(argparse, "Namespace", lambda *_, **__: pytest.fail("made"))
    assert torch.equal(extract_weights(tmp_path / "official.pt", [digest])["w"], torch.ones(2))


def unsafe_calls(place: Path) -> set[str]:
    """Returns the files below `place` with calls that pyproject.toml bans because a file can run code through them."""
    options = ["--no-cache", "--output-format=json", f"--config={ROOT / 'pyproject.toml'}"]
    rules = "--select=TID251,S102,S301,S307,S602,S604,S605"
    ruff = [Path(sys.executable).with_name("ruff"), "check", *options, rules, place]
    return {Path(each["filename"]).name for each in json.loads(subprocess.run(ruff, capture_output=True).stdout)}


def test_D3_no_unsafe_call() -> None:
    assert unsafe_calls(ROOT) == set()
    options = ["git", "grep", "-nE", "(allow_pickle|trust_remote_code)=([^F]|F[^a])", "--", "*.py"]
    assert subprocess.run(options, cwd=ROOT, capture_output=True, text=True).stdout == ""


UNSAFE = [
    "from pickle import loads as read\nread(b)",
    "import torch\nread = torch.load\nread(f)",
    "import torch as t\nt.jit.load(f)",
    "from torch.distributed import checkpoint\ncheckpoint.load(x)",
    "eval('1')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "from os import system\nsystem('ls')",
]


def test_D3_the_scan_sees(tmp_path: Path) -> None:
    for number, code in enumerate([*UNSAFE, "import subprocess\nm.eval()\nsubprocess.run(a, shell=False)"]):
        (tmp_path / f"{number}.py").write_text(code)
    assert unsafe_calls(tmp_path) == {f"{number}.py" for number in range(len(UNSAFE))}


def test_D4_dcp_folder_is_refused_unopened(tmp_path: Path, tiny: list[str]) -> None:
    """A folder as torch.distributed.checkpoint writes it, with a payload where it keeps a pickle."""
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(payloads(tmp_path / "ran")["system call"]))
    (folder / "__0_0.distcp").write_bytes(b"\0" * 64)
    opened: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and str(folder) in str(arguments[0]):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)  # stays for the life of the process
    for read in (find_checkpoint, load_model_weights, Source.open, Generator.from_checkpoint):
        with pytest.raises(CheckpointError, match=r"dcp is a torch\.distributed\.checkpoint folder, which is not"):
            read(folder)
    for key in ("train.init_from", "train.resume"):
        with pytest.raises(CheckpointError, match=r"torch\.distributed\.checkpoint"):
            make([*tiny, f"{key}={folder}", "train.max_steps=1"]).fit()
    assert opened == []
    for name in (".metadata", "__0_0.distcp"):
        with pytest.raises(ValueError, match=r"not a complete|Python objects"):
            read_state_dict(folder / name)
    assert opened and not (tmp_path / "ran").exists()


def header(content: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, of a length that may be a lie."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


SAFETENSORS = {
    "header of 10^12 bytes": header({}, length=10**12),
    "header of 99 MB in a file of 100 B": header({"w": entry(0, 8, 2)}, bytes(8), length=99_000_000),
    "overlap": header({"w": entry(0, 8, 2), "v": entry(4, 12, 2)}, bytes(12)),
    "4 EB": header({"w": entry(0, 2**62, 2**60)}, bytes(4)),
    "product of sizes overflows": header({"w": entry(0, 8, 2**33, 2**33)}, bytes(8)),
    "negative size": header({"w": entry(0, 8, -2)}, bytes(8)),
    "bytes without an owner": header({"w": entry(0, 8, 2)}, bytes(80)),
    "nested without end": header(b'{"w":' * 10_000),
    "empty": b"",
}


@pytest.mark.parametrize("kind", sorted(SAFETENSORS))
def test_D5_header_attacks(tmp_path: Path, kind: str) -> None:
    """As a file of weights, and in a checkpoint whose manifest the attacker makes fit."""
    file, folder = tmp_path / "bad.safetensors", whole_checkpoint(tmp_path)
    for each in (file, folder / "optim.safetensors"):
        each.write_bytes(SAFETENSORS[kind])
    seal(folder)
    with cheap(seconds=0.2):
        refuses(r"bad\.safetensors is not a complete safetensors file", lambda: read_state_dict(file))
        refuses(r"optim\.safetensors cannot be read", lambda: load_checkpoint(folder), CheckpointError)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "{}", "", '{"format": NaN}'])
@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
def test_D5_json_attacks(tmp_path: Path, name: str, text: str) -> None:
    folder = whole_checkpoint(tmp_path)
    (folder / name).write_text(text)
    if name != MANIFEST:
        seal(folder)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def whole_checkpoint(root: Path) -> Path:
    group = {"w": torch.ones(2)}
    return write_checkpoint(Checkpoint(1, 2, group, group, group, group), load_config(), root / "checkpoints")


@pytest.mark.parametrize(("version", "safe"), [("2.6.0+cu124", False), ("2.9.1", False), ("2.10.0", True)])
def test_D6_version_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, safe: bool) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    codec_folder(tmp_path)
    monkeypatch.setattr(torch, "__version__", version)
    assert read_state_dict(tmp_path / "a.safetensors")
    for read in (lambda: read_state_dict(tmp_path / "a.pt"), lambda: Taef2.from_folder(tmp_path)):
        if safe:
            assert read()
            continue
        with pytest.raises(ValueError, match=rf"because with PyTorch {version.split('+')[0]}.*2\.10 or newer"):
            read()


YAMLS = {
    "object": ("train: !!python/object/apply:os.mkdir [MARKER]\n", "tag"),
    "own tag": ("train: {seed: !secret 3}\n", "tag"),
    "alias bomb": ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)), "alias"),
    "recursion": ("train: &a\n  output_dir: *a\n", "alias"),
    "10 MB of comment": ("#" * 10_000_000 + "\ntrain: {seed: 1}\n", "too long"),
    "many values": ("sample:\n  labels: [" + "1," * (MAX_YAML_CHARACTERS // 2 - 20) + "1]\n", "too many values"),
    "deep, open": ("train: " + "[" * 60_000, "levels deep"),
    "deep, indented": ("\n".join(" " * i + "a:" for i in range(300)), "levels deep"),
    "duplicate key": ("train:\n  seed: 1\n  seed: 2\n", "duplicate key seed"),
    "two documents": ("train: {seed: 1}\n---\ntrain: {seed: 2}\n", "document"),
    "long number": ("train:\n  seed: " + "9" * 5_000 + "\n", "digits"),
    "not text": ("train: {seed: 1}\x00\n", "not valid YAML"),
}


@pytest.mark.parametrize("kind", sorted(YAMLS))
def test_D7_hostile_yaml(tmp_path: Path, kind: str) -> None:
    text, word = YAMLS[kind]
    marker, file = tmp_path / "ran", tmp_path / "bad.yaml"
    file.write_text(text.replace("MARKER", str(marker)))
    for read in (load_config, convert.read_official):
        with cheap(1e9, seconds=1.0), pytest.raises(ValueError, match=word) as error:
            translate_config(config) if isinstance(config := read(file), dict) else None
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("value", ["[" * 60_000, "!!python/name:os.system", "&a [*a]", "x" * 70_000])
def test_D7_hostile_override(value: str) -> None:
    with pytest.raises(ValueError, match=r"train\.output_dir"):
        load_config(None, [f"train.output_dir={value}"])


SECRET = "s3cr3t-value-of-the-environment"


@pytest.mark.parametrize("text", ["${oc.env:LATTE_SECRET}", "a${train.seed}b", "\\${oc.env:LATTE_SECRET}"])
def test_D8_resolvers_are_refused_and_nothing_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, text: str
) -> None:
    monkeypatch.setenv("LATTE_SECRET", SECRET)
    file = tmp_path / "a.yaml"
    yamls = [{"data": {"path": text}}, {"sample": {"labels": ["a", text]}}, {"train": text}, {text: 1}]
    attempts = [(json.dumps(content), ["--config", str(file)]) for content in yamls]  # JSON is YAML
    attempts += [("{}", [f"data.path={text}"]), ("{}", [f"sample.labels=[{text!r}]"])]
    for content, arguments in attempts:
        file.write_text(content)
        code, said = call(train.main, *arguments, f"train.output_dir={tmp_path / 'run'}")
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert SECRET not in said + capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_D8_no_secret_reaches_a_run(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTE_SECRET", SECRET)
    run([*tiny, "train.max_steps=1"])
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.name == "config.yaml" for file in files)
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A data set of one clip, a stranger's picture outside it, and a link that leads there."""
    root = tmp_path / "set"
    (root / "A" / "clip").mkdir(parents=True)
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for number in range(4):
        picture.save(root / "A" / "clip" / f"{number}.png")
    picture.save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "folder").symlink_to(tmp_path)
    return root


ENTRIES = {
    "parent inside": "A/../../outside.png",
    "absolute": "OUTSIDE",
    "symlink": "link.png",
    "symlinked folder": "folder/outside.png",
    "address": "A/http://localhost/a.png",
    "concat": "concat:A/clip/0.png|A/clip/1.png",
    "NUL": "A/clip/0.png\0.png",
    "newline": "A/clip/\n0.png",
    "escape": "A/clip/\x1b[31m0.png",
    "too long": "a" * 5000 + ".png",
    "not text": "A/\udcff.png",
}


def read_entries(root: Path, *entries: str) -> list[str]:
    file = root.parent / "list.txt"
    file.write_bytes("\n".join(entries).encode(errors="surrogateescape"))
    config = DataConfig(path=str(root), num_frames=4, frame_interval=1, num_images=1, frame_list=str(file))
    return [clip.name for clip in read_frame_list(config, build_catalog(config))]


@pytest.mark.parametrize("kind", sorted(ENTRIES))
def test_D9_entry(listed: Path, kind: str) -> None:
    text = ENTRIES[kind].replace("OUTSIDE", str(listed.parent / "outside.png"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"list\.txt, line 3: ") as error:
        read_entries(listed, "A/clip/0.png", "", text, "")
    assert printable(str(error.value)).isprintable()


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile 'good.bin'\n",
    "ffconcat, late": "\n\n ffconcat version 1.0\nfile 'good.bin'\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.bin\n#EXT-X-ENDLIST\n",
    "HLS, byte order mark": "\ufeff#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "DASH": '<?xml version="1.0"?>\n<MPD><Period><BaseURL>good.bin</BaseURL></Period></MPD>\n',
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "image sequence": "good%d.mkv",
    "address": "http://localhost/good.bin",
}


@pytest.fixture(scope="module")
def good_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mp4(tmp_path_factory.mktemp("clip") / "good.mp4", np.zeros((4, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("kind", sorted(PLAYLISTS))
def test_D10_playlists(tmp_path: Path, good_clip: Path, kind: str) -> None:
    """The file that they name is there: a library that followed them would succeed."""
    for reader, suffix in (("auto", ".mp4"), ("decord", ".mp4"), ("auto", ".MOV"), ("auto", ".ts")):
        folder = tmp_path / f"set {reader}{suffix}"
        folder.mkdir()
        shutil.copy(good_clip, folder / "good.bin")  # not of the set, but there to be followed
        bad = folder / f"list{suffix}"
        bad.write_text(PLAYLISTS[kind])
        word = kind.partition(",")[0]
        reason = f"is an {word} playlist" if word in ("HLS", "ffconcat") else "is not a video"
        with pytest.raises(VideoError, match=reason):
            open_video(bad, reader)
        config = DataConfig(path=str(folder), num_frames=1, strict=True, reader=reader)
        with pytest.raises(VideoError, match=r"playlist|not a video"):
            build_dataset(config, seed=0)[0, 0]


def test_D10_the_playlists_would_be_followed(tmp_path: Path, good_clip: Path) -> None:
    """Positive control: FFmpeg by itself decodes an ffconcat list named .mp4."""
    import av

    shutil.copy(good_clip, tmp_path / "good.bin")
    (tmp_path / "list.mp4").write_text(PLAYLISTS["ffconcat"])
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert container.format.name == "concat" and next(container.decode(video=0)).width


def archive(kind: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED) as file:
        if kind == "symlink":
            link = zipfile.ZipInfo("a/link.png")
            link.external_attr = 0o120777 << 16
            file.writestr(link, "/etc/passwd")
        file.writestr({"parent": "../../out.png"}.get(kind, "a/0.png"), bytes(20_000_000 if kind == "bomb" else 8))
    raw = content.getvalue()
    if kind == "encrypted":
        raw = raw[: raw.rindex(b"PK\1\2") + 8] + b"\1" + raw[raw.rindex(b"PK\1\2") + 9 :]
    return raw


SUSPICIOUS = {
    "parent": r"its entry '\.\./\.\./out\.png' leads out of the archive",
    "symlink": r"its entry 'a/link\.png' is a symbolic link",
    "bomb": r"its entry 'a/0\.png' unpacks from \d+ bytes to 20000000, more than 200 times as many",
    "encrypted": r"its entry 'a/0\.png' is encrypted",
}


@pytest.mark.parametrize("kind", sorted(SUSPICIOUS))
def test_D11_zip_as_data(tmp_path: Path, kind: str) -> None:
    """Refused as a whole, from its directory; nothing is written, nothing is unpacked."""
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "clips.zip"
    file.write_bytes(archive(kind))
    with cheap(5e6), pytest.raises(VideoError, match=rf"clips\.zip: is refused: {SUSPICIOUS[kind]}") as error:
        prepare_dataset.main(["folder", str(file), str(tmp_path / "out")])
    assert printable(str(error.value)).isprintable()
    with pytest.raises(ValueError, match=r"holds none \(found: 1 \*\.zip\)"):
        build_catalog(DataConfig(path=str(file.parent)))  # below a data folder an archive is a stray
    assert sorted(tmp_path.rglob("*")) == [file.parent, file]


def test_D11_total_of_many_small_bombs(tmp_path: Path) -> None:
    """Each is below the limit of one; together they are not."""
    file = tmp_path / "clips.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as content:
        for number in range(20):
            content.writestr(f"{number}.png", bytes(2**20))
    with pytest.raises(VideoError, match=r"its \d+ bytes unpack to 20971520, more than 200 times as many"):
        unpack(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_D11_a_lying_size_unpacks_no_more_than_it_says(tmp_path: Path) -> None:
    """The directory states 1,000 bytes for 20 million: reading stops there, and the checksum tells."""
    file = tmp_path / "clips.zip"
    raw = bytearray(archive("bomb"))
    place = raw.rindex(b"PK\1\2")
    raw[place + 24 : place + 28] = struct.pack("<L", 1000)
    file.write_bytes(bytes(raw))
    with cheap(5e6), pytest.raises(VideoError, match=r"0\.png: cannot be unpacked: the archive is damaged"):
        unpack(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_D11_bomb_as_checkpoint(tmp_path: Path) -> None:
    """Substitute: the archives that are opened are .pt files; one that unpacks to more than itself is refused."""
    plain, bomb = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(5_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    assert bomb.stat().st_size * 500 < plain.stat().st_size
    with cheap(5e6):
        refuses(r"bomb\.pt is refused: its \d+ records unpack to 20\d{6} bytes", lambda: read_state_dict(bomb))
    encrypted = tmp_path / "encrypted.pt"
    encrypted.write_bytes(archive("encrypted"))
    with pytest.raises(ValueError, match=r"encrypted\.pt is refused"):
        read_state_dict(encrypted)
    assert read_state_dict(plain)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuses every connection; gives what was asked for."""
    asked: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(str(arguments[-1:]))
        raise OSError("no network in tests")

    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(owner, name, refuse)
    yield asked


def codec_folder(root: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Taef2().encoder.state_dict(), root / ENCODER_FILE)
    torch.save(Taef2().decoder.state_dict(), root / DECODER_FILE)
    return root


@pytest.mark.parametrize("damage", ["cut", "another network", "no dictionary"])
def test_D12_codec_files(tmp_path: Path, no_network: list[str], damage: str) -> None:
    """Substitute: a codec's files have no stated hash; what is not whole or not the network's is refused, offline."""
    file = codec_folder(tmp_path) / DECODER_FILE
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        torch.save(torch.nn.Linear(2, 2).state_dict() if damage == "another network" else [1], file)
    refuses(DECODER_FILE, lambda: open_codec(tmp_path, latent_channels=32))
    assert no_network == []


def test_D12_diffusers_folder(tmp_path: Path, no_network: list[str]) -> None:
    """Substitute: as above, for the diffusers format; damaged weights of it are in test_models_autoencoder.py."""
    folder = shutil.copytree(ROOT / "assets/demo/codec", tmp_path / "codec")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(payloads(tmp_path / "ran")["system call"], folder / "diffusion_pytorch_model.bin")
    refuses(r"codec\.path=.*codec", lambda: open_codec(folder, latent_channels=16))
    assert no_network == [] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "{}", '{"_class_name": "Popen"}', '{"_class_name": ["a"]}'])
def test_D12_codec_description(tmp_path: Path, text: str) -> None:
    """Substitute: as above. The class is one of a list, never whatever name the file holds."""
    (tmp_path / "config.json").write_text(text)
    refuses(r"codec\.path=", lambda: open_codec(tmp_path))


def test_D12_a_hub_name_without_a_network(no_network: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Substitute: as above. A name that would need the network ends in one sentence."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded from the hub"):
        LatentCodec.from_config(CodecConfig(path="nobody/nothing-at-all"))
    assert no_network == []


class Plain(torch.nn.Module):
    """TorchScript that touches no file."""

    def __init__(self, file: str = "") -> None:
        super().__init__()
        self.file = file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], 101)


class Writes(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.file)
        return torch.zeros(x.shape[0], 101)


class WritesInATask(torch.nn.Module):
    """Writes in a task that runs at the same time as the network."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.inner = Writes(file)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.jit.wait(torch.jit.fork(self.inner, x))


class WritesWhenLoaded(Plain):
    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.file, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.file = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.file)


class WritesWhenHooked(Plain):
    """Writes in a hook of the call, which is in no graph of the network itself."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.register_forward_pre_hook(WritesWhenHooked.write)

    def write(self, x: tuple[torch.Tensor]) -> None:
        torch.save(x[0], self.file)


CLIPS = torch.zeros(1, 16, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("kind", [Writes, WritesInATask, WritesWhenLoaded, WritesWhenHooked])
def test_D12_a_detector_that_touches_files_is_not_run(tmp_path: Path, kind: type[torch.nn.Module]) -> None:
    marker, file = tmp_path / "ran", tmp_path / "c3d.pt"
    torch.jit.script(kind(str(marker))).save(str(file))
    marker.unlink(missing_ok=True)
    torch.jit.load(file)(CLIPS)  # positive control: TorchScript itself runs them
    marker.unlink()
    if kind is WritesWhenHooked:
        load_detector("c3d", file)(CLIPS)  # hooks are left alone
    else:
        reason = "__setstate__" if kind is WritesWhenLoaded else r"holds aten::save|holds prim::CallMethod"
        refuses(rf"(?s)c3d\.pt is not (run|opened): .*({reason})", lambda: load_detector("c3d", file))
    assert not marker.exists()


def rewritten(file: Path, body: str) -> Path:
    """A network whose source says `body`."""
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(Plain()), content)
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(file, "w") as new:
        for record in old.infolist():
            part = old.read(record)
            if record.filename.endswith(".py"):
                head, call, _ = part.partition(b"Tensor:\n")
                part = head + call + f"    {body}\n    return x\n".encode()
            new.writestr(record.filename, part)
    return file


@pytest.mark.parametrize(
    "body",
    [
        'if True:\n      torch.save(x, "MARKER")\n    else:\n      pass',
        'x = torch.from_file("MARKER", False, 1)',
        'getattr(torch, "s\\141ve")(x, "MARKER")',
        '_0 = (torch. # a comment\n      save(x, "MARKER"))',
        '_0 = ops.profiler._record_function_enter("a", None)',
    ],
)
def test_D12_nor_by_another_spelling(tmp_path: Path, body: str) -> None:
    marker = tmp_path / "ran"
    file = rewritten(tmp_path / "c3d.pt", body.replace("MARKER", str(marker)))
    with pytest.raises(ValueError, match=r"c3d\.pt is not run: it holds"):
        load_detector("c3d", file)
    assert not marker.exists()


def test_D12_a_plain_source_is_run(tmp_path: Path) -> None:
    file = rewritten(tmp_path / "c3d.pt", "x = torch.zeros([1, 101])")
    assert load_detector("c3d", file)(CLIPS).shape == (1, 101)


@pytest.mark.parametrize("damage", ["cut", "pickle", "bare", "network", "payload", "zip"])
def test_D12_detector_files(tmp_path: Path, no_network: list[str], damage: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / ("c3d.pkl" if damage == "pickle" else "c3d.pt")
    payload = payloads(marker)
    if damage in ("pickle", "bare"):
        file.write_bytes(pickle.dumps(payload["system call"]))
    elif damage == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("c3d/code/readme.txt", "nothing")
    elif damage == "cut":
        os.truncate(file, write_stub("c3d", tmp_path).stat().st_size // 2)
    else:
        torch.save({"network": torch.nn.Linear(2, 2), "payload": payload["eval"]}[damage], file)
    kind = "is a pickle" if damage in ("pickle", "bare") else "(is (?!a pickle)|holds )"
    refuses(rf"{re.escape(file.name)} {kind}.*https://www\.dropbox\.com", lambda: load_detector("c3d", file))
    assert no_network == [] and not marker.exists()


def test_D12_a_detectors_hash(tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_stub("c3d", tmp_path)
    digest, wrong = hashlib.sha256(file.read_bytes()).hexdigest(), hashlib.sha256(b"another").hexdigest()
    assert load_detector("c3d", file).sha256 == digest
    assert load_detector("c3d", str(file), sha256=f" {digest.upper()} ").sha256 == digest
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=rf"c3d\.pt is not opened: its SHA-256 is {digest}, but {wrong} is expected"):
        load_detector("c3d", file, sha256=wrong)
    assert no_network == []


@pytest.mark.parametrize("attack", ["bomb", "many", "encrypted"])
def test_D12_D11_a_detector_as_a_bomb(tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_stub("c3d", tmp_path)
    monkeypatch.setattr("evaluation.torchscript.MAX_RECORDS", 50)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        if attack == "bomb":
            archive.writestr("c3d/code/zeros.py", bytes(100 * 2**20))
        for number in range(60 if attack == "many" else 0):
            archive.writestr(f"c3d/code/{number}.py", "")
    content = bytearray(file.read_bytes())
    if attack == "encrypted":
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"c3d\.pt is refused"):
        load_detector("c3d", file)


@pytest.mark.parametrize("name", [*NASTY, "", ".", "-rf", "a" * 300, "\x00", "con.mp4/../../x"])
def test_D13_slug(name: str, tmp_path: Path) -> None:
    part = slug(name)
    assert part and part.isascii() and part.isprintable() and len(part) <= 80
    assert not set(part) & set("/\\ \n\x1b\0") and part[0] not in ".-"
    assert (tmp_path / part).resolve().parent == tmp_path.resolve()


def test_D13_samples_of_nasty_classes_stay_in_their_folder(tmp_path: Path) -> None:
    overrides = [f"model.num_classes={len(NASTY)}", f"sample.num_videos={len(NASTY)}", "sample.steps=2"]
    config = load_config(None, [*TINY, *overrides, f"sample.save_video_path={tmp_path}/deep/samples"])
    conditions = class_conditions(config.model, torch.device("cpu"), NASTY)
    generator = Generator(build_model(config), LatentCodec.from_config(config.codec), config, conditions)
    folder = tmp_path / "deep" / "samples"
    source, device = Source(Path("x\n\x1b[2J"), config, NASTY), torch.device("cpu")
    files = write_samples(generator, Request(source, config, device, sampler_settings(config)))
    inside = {file.name for file in folder.iterdir()}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {folder / name for name in inside}
    assert inside == {each["file"] for each in files} | {"samples.gif", "samples.png", "samples.json"}
    assert all(name.isascii() and name.isprintable() for name in inside)
    text = (folder / "samples.json").read_text()
    assert text.replace("\n", "").isprintable()
    assert [each["class_name"] for each in json.loads(text)["videos"]] == NASTY


def test_D13_error_sentences() -> None:
    def fail(argv: list[str]) -> int:
        raise ValueError(f"no class {NASTY[1]} {NASTY[2]} \udcff")

    assert call(fail) == (2, "error: no class a\\nb \\x1b[31mred\\x1b[0m \\udcff\n")


def test_D13_file_names_in_warnings_and_run_logs(tmp_path: Path, frame_folders: Path, caplog: Any, capsys: Any) -> None:
    """A run over clips with such names: every line that is shown, and every line of every log, is plain."""
    root = tmp_path / "set"
    shutil.copytree(frame_folders / "falls", root / "a\nb")
    shutil.copytree(frame_folders / "rises", root / "\x1b[31mred\x1b[0m")
    for number in range(7):
        (root / "a\nb" / "clip0" / f"{number:03d}.png").write_text("no picture")
    (root / "a\nb" / "clip0").rename(root / "a\nb" / "c\x1b[2J\nd")
    overrides = [f"data.path={root}", f"train.output_dir={tmp_path / 'run'}", "train.max_steps=6"]
    with caplog.at_level(logging.WARNING):
        run([*TINY, *overrides])
    said = [record.getMessage() for record in caplog.records] + capsys.readouterr().err.split("\n")
    assert any(r"c\x1b[2J\nd" in line for line in said)
    assert all(line.replace("\r", "").isprintable() for line in said)
    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (tmp_path / "run" / name).read_text().split("\n"):
            assert line.isprintable() and (not line or isinstance(json.loads(line), dict))


# a line of a shell script that runs text, or splits a list of nodes into words
EVALUATES = re.compile(
    r"(?m)^(?!\s*#)((?! #).)*(\b(eval|source|xargs|envsubst|(ba)?sh -c)\b|`|(?<!\")\$\{?SLURM_(JOB_)?NODELIST)"
)


@pytest.mark.parametrize("line", ["eval $X", "echo `ls`", "bash -c ls", "srun -w $SLURM_NODELIST x", "source ./x"])
def test_D14_the_scan_sees(line: str) -> None:
    assert EVALUATES.search(f"set -e\n{line}\n") and not EVALUATES.search(f"# {line}\n")


def test_D14_scripts_evaluate_no_text() -> None:
    """Shell text in what Slurm says is run against the scripts in test_faults_launch.py."""
    scripts = [file for pattern in ("*/*.sh", "*/*.slurm") for file in ROOT.glob(pattern)]
    assert len(scripts) >= 14
    assert [file for file in scripts if EVALUATES.search(file.read_text())] == []
