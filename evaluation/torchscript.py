"""Loads TorchScript archives, which are programs, after checking their operations.

TorchScript cannot call Python, but it can write files (`torch.save`) and read them (`torch.from_file`), even while
being loaded (`__setstate__`). Detectors need none of this. Checks come in order: hash, zip archive, code, and, before
the first call, operations. This checks a file; it is not a sandbox.
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
MAX_RECORDS = 100_000  # per archive; one per tensor and source file
MAX_CODE_BYTES = 64 * 2**20  # only source code is compressed in such archives
NAMESPACES = ("aten", "prim")  # of built-in operations; others come from extensions
# file access, and calls whose target is known only at run time, including remote calls
REFUSED = ("aten::save", "aten::from_file", "prim::CallMethod", "prim::CallFunction", "prim::rpc")
LOAD_TIME = (b"__setstate__", b"torch.classes")  # code that runs before it can be checked


def read_bytes(path: Path, origin: str, sha256: str | None) -> tuple[bytes, str]:
    """Reads a detector file; returns bytes and SHA-256. Raises: FileNotFoundError, naming `origin`; ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no detector file {path}; nothing is downloaded: get it from {origin}.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is {path.stat().st_size / 2**30:.1f} GiB: no detector is that large.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.strip().lower():
        raise ValueError(f"{path} is not opened: its SHA-256 is {found}, but {sha256} is expected.")
    return content, found


def load_torchscript(content: bytes, path: Path, origin: str) -> Any:
    """Loads the network of a TorchScript archive on the CPU, in evaluation mode.

    Raises: ValueError for a pickle, bare weights, a broken archive, a zip bomb, or forbidden operations.
    """
    _check_archive(content, path, origin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but detectors use it
            network = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()  # noqa: TID251 after all checks
        graph = network.inlined_graph
    except Exception as error:  # a broken archive can raise anything
        raise ValueError(f"{path} is not a whole TorchScript network with a forward; get it from {origin}.") from error
    kinds = set(_operations(graph))
    refused = sorted(kind for kind in kinds if kind.partition("::")[0] not in NAMESPACES or kind.startswith(REFUSED))
    if refused:
        raise ValueError(f"{path} is not run: it holds {', '.join(refused)}, which no detector needs.")
    return network


def is_torchscript(content: bytes) -> bool:
    """Returns whether the bytes are a zip archive with source code, as written by `torch.jit.save`."""
    return any("/code/" in each.filename.lower() for each in _records(content) or [])


def _records(content: bytes) -> list[zipfile.ZipInfo] | None:
    """Lists the records of a zip archive; None for other bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return None


def _check_archive(content: bytes, path: Path, origin: str) -> None:
    """Raises ValueError for other files, zip bombs, and code that runs at load time."""
    advice = f"a TorchScript file is needed: get it from {origin}."
    if content[:1] == b"\x80" or (path.suffix in (".pkl", ".pickle") and not is_torchscript(content)):
        raise ValueError(f"{path} is a pickle, which is not opened because it can run any code; {advice}")
    records = _records(content)
    if records is None:
        raise ValueError(f"{path} is not a TorchScript file, or not whole; {advice}")
    if not is_torchscript(content):
        raise ValueError(f"{path} holds no network, at most weights; {advice}")
    unpacked = sum(record.file_size for record in records)
    encrypted = any(record.flag_bits & 1 for record in records)
    if encrypted or len(records) > MAX_RECORDS or unpacked > len(content) + MAX_CODE_BYTES:
        raise ValueError(
            f"{path} is refused: its {len(records)} records unpack to {unpacked} bytes from {len(content)}, "
            "but torch.jit.save compresses only source code, and encrypts nothing."
        )
    sources = [record for record in records if record.filename.lower().endswith((".py", ".pkl"))]
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            texts = [(record.filename, archive.read(record)) for record in sources]  # names may repeat
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole TorchScript file: copy it again.") from error
    for name, word in ((name, word) for name, text in texts for word in LOAD_TIME if word in text):
        raise ValueError(f"{path} is not opened: its {name} has {word.decode()}, which runs while it is loaded.")


def _operations(block: Any) -> Iterator[str]:
    """Yields the kind of every operation in a graph, including branches, loops and parallel parts."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _operations(inner)
        for name in node.attributeNames():
            if node.kindOf(name) == "g":
                yield from _operations(node.g(name))
