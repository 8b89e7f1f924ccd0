"""Loads TorchScript archives, which are programs, after checking their operations.

TorchScript cannot call Python, but it can write files (`torch.save`), read them (`torch.from_file`), and do so
while it is loaded (`__setstate__`). A detector does none of this. The hash is checked before the zip archive, the
archive before its code, and the operations before the first call. It is a check of one file, not a sandbox.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MAX_BYTES = 4 * 2**30
MAX_RECORDS = 100_000  # of an archive; one per tensor and source file
MAX_CODE_BYTES = 64 * 2**20  # source code is the only compressed part of such an archive
NAMESPACES = ("aten", "prim")  # of the operations that networks use; others come from extensions
# Operations on files, and calls whose target is known only at run time, remote calls included
REFUSED = ("aten::save", "aten::from_file", "prim::CallMethod", "prim::CallFunction", "prim::rpc")
LOAD_TIME = (b"__setstate__", b"torch.classes")  # runs before it can be checked


def read_bytes(path: Path, origin: str, sha256: str | None) -> tuple[bytes, str]:
    """Reads a detector file; returns its bytes and SHA-256. Raises: FileNotFoundError, naming `origin`; ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no detector file {path}; nothing is fetched: get it from {origin}.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is {path.stat().st_size / 2**30:.1f} GiB: no detector is that large.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.strip().lower():
        raise ValueError(f"{path} is not opened: its SHA-256 is {found}, but {sha256} is expected.")
    return content, found


def load_torchscript(content: bytes, path: Path, origin: str) -> Any:
    """Loads the network of a TorchScript archive on the CPU, in evaluation mode.

    Raises: ValueError: a pickle, weights only, a broken archive, a zip bomb, or forbidden operations.
    """
    _check_archive(content, path, origin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but detectors use it
            network = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
        graph = network.inlined_graph
    except Exception as error:  # a broken archive can raise anything
        raise ValueError(f"{path} is not a whole TorchScript network with a forward; get it from {origin}.") from error
    kinds = set(_operations(graph))
    refused = sorted(kind for kind in kinds if kind.partition("::")[0] not in NAMESPACES or kind.startswith(REFUSED))
    if refused:
        raise ValueError(f"{path} is not run: it holds {', '.join(refused)}, which no detector needs.")
    return network


def is_torchscript(content: bytes) -> bool:
    """Returns whether the bytes are a zip archive with source code, as `torch.jit.save` writes."""
    return any("/code/" in each.filename.lower() for each in _records(content) or [])


def _records(content: bytes) -> list[zipfile.ZipInfo] | None:
    """Lists the records of a zip archive; None for other bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return None


def _check_archive(content: bytes, path: Path, origin: str) -> None:
    """Refuses other files, an archive that unpacks to far more than its size, and code that runs at load time."""
    advice = f"a TorchScript file is needed: get it from {origin}."
    if content[:1] == b"\x80" or (path.suffix in (".pkl", ".pickle") and not is_torchscript(content)):
        raise ValueError(f"{path} is a pickle, which is not opened because that can run any code; {advice}")
    records = _records(content)
    if records is None:
        raise ValueError(f"{path} is no TorchScript file, or not whole; {advice}")
    if not is_torchscript(content):
        raise ValueError(f"{path} holds no network, at most its weights; {advice}")
    unpacked = sum(record.file_size for record in records)
    encrypted = any(record.flag_bits & 1 for record in records)
    if encrypted or len(records) > MAX_RECORDS or unpacked > len(content) + MAX_CODE_BYTES:
        raise ValueError(
            f"{path} is refused: its {len(records)} records unpack to {unpacked} bytes from {len(content)}, "
            "but torch.jit.save packs source code only, and encrypts nothing."
        )
    sources = [record for record in records if record.filename.lower().endswith((".py", ".pkl"))]
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            texts = [(record.filename, archive.read(record)) for record in sources]  # names can come twice
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole TorchScript file: copy it again.") from error
    for name, word in ((name, word) for name, text in texts for word in LOAD_TIME if word in text):
        raise ValueError(f"{path} is not opened: its {name} has {word.decode()}, which runs while it is loaded.")


def _operations(block: Any) -> Iterator[str]:
    """Yields the kind of every operation of a graph, including branches, loops and parallel parts."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _operations(inner)
        for name in node.attributeNames():
            if node.kindOf(name) == "g":
                yield from _operations(node.g(name))
