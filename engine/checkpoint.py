"""Checkpoints: folders of safetensors and JSON, hashed, written under a temporary name and renamed. No pickle.

    step-0000012/
        model.safetensors   weights after the step; with `lora.rank`, only the adapters
        ema.safetensors     EMA of the weights
        optim.safetensors   AdamW moments, as `<moment>/<parameter>`; `TrainState.extra`, as `weight/<parameter>`
        rng.safetensors     RNG states of every rank, and the timestep sampler's history
        state.json          step, samples_seen and all other numbers and names
        config.yaml         the whole configuration
        manifest.json       sizes and SHA-256 of the above; written last

The file `latest` names the newest. `NAME.tmp-01234567` is being written or deleted, and is removed at the next
start; `NAME.damaged-01234567` was set aside when a run resumed from an older one.

An export has the same format, with fewer weight files: see `engine.weights.export_weights`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import storage
from common.checks import require
from common.storage import file_sha256, free_bytes, sync, write_atomically, write_synced
from common.text import gigabytes

from .config import Config, load_config
from .run_folder import recreate_checkpoints

log = logging.getLogger(__name__)

FORMAT = "latte-checkpoint-1"
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{7,})")
GROUPS = ("model", "ema", "optim", "rng")  # groups of tensors, one file each
UNFINISHED_NAME = re.compile(r"(step-\d{7,}|latest)\.tmp-[0-9a-f]{8}")  # see `_aside`


@dataclass
class Checkpoint:
    """The complete state of a training run, for an exact resume. Tensors are on the CPU."""

    step: int
    samples_seen: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optim: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)  # further JSON-able facts

    @property
    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by group."""
        return {name: getattr(self, name) for name in GROUPS}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for group in self.groups.values() for value in group.values())


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or in another format; the message names the file."""


def step_folder(root: Path, step: int) -> Path:
    """Returns `root/step-0000012` for step 12."""
    return root / f"step-{step:07d}"


def save_checkpoint(
    checkpoint: Checkpoint, config: Config, root: Path, keep_last: int = 2, keep_every: int = 0
) -> Path:
    """Writes and verifies `checkpoint` as `root/step-...`, points `root/latest` to it, prunes older ones.

    A folder with its final name is always complete: files are written and synced in a temporary folder next to it,
    which is renamed, then read back before any older checkpoint is deleted.

    Args:
        keep_last: newest checkpoints kept, in addition to those of `keep_every`; 0 keeps all.
        keep_every: checkpoints at multiples of this step are never pruned; 0: off.
    """
    for name, group in checkpoint.groups.items():
        bad = [key for key, value in group.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad:
            raise CheckpointError(f"refusing to save step {checkpoint.step}: {name} has non-finite values in {bad[0]}.")
    state = {"step": checkpoint.step, "samples_seen": checkpoint.samples_seen, **checkpoint.state}
    folder = write_folder(step_folder(root, checkpoint.step), checkpoint.groups, state, config)
    verify(folder)
    latest = folder.with_name("latest")
    write_atomically(latest, lambda file: file.write_bytes(folder.name.encode()), temporary=_aside(latest))
    sync(folder.parent)
    if keep_last:
        _prune(folder, keep_last, keep_every)
    return folder


def write_folder(final: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], config: Config) -> Path:
    """Writes a folder in this format, completely or not at all; returns `final`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(final)
    aside.mkdir()
    try:
        for name, group in tensors.items():
            save_file({key: value.contiguous() for key, value in group.items()}, aside / f"{name}.safetensors")
            sync(aside / f"{name}.safetensors")
        write_synced(aside / "state.json", json.dumps(state, indent=2).encode())
        write_synced(aside / "config.yaml", config.to_yaml().encode())
        written = sorted(aside.iterdir())
        files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in written}
        manifest = {"format": FORMAT, "step": state["step"], "torch": torch.__version__, "files": files}
        write_synced(aside / MANIFEST, json.dumps(manifest, indent=2).encode())
        sync(aside)
        discarded = final.rename(_aside(final)) if final.exists() else None  # an earlier attempt at the same step
        aside.rename(final)
        if discarded is not None:
            shutil.rmtree(discarded, ignore_errors=True)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(final.parent)
    return final


def _aside(final: Path) -> Path:
    """Returns a temporary name next to `final`, which the next start deletes."""
    return final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")


def verify(folder: Path) -> None:
    """Checks every file of `folder` against its manifest; CheckpointError names the first missing or changed one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        kind = manifest["format"]
        listed = manifest["files"] if kind == FORMAT else {}
        files = {str(name): (facts["bytes"], facts["sha256"]) for name, facts in listed.items()}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{folder} is not a checkpoint of this project: it has no readable {MANIFEST}.") from None
    if kind != FORMAT:
        raise CheckpointError(f"{folder} is of format {kind!r}; this version reads {FORMAT!r}.")
    unlisted = [file.name for file in sorted(folder.glob("*.safetensors")) if file.name not in files]
    if unlisted:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} does not list {', '.join(unlisted)}.")
    _check_step(manifest, folder / MANIFEST)
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing.")
        if file.stat().st_size != size or file_sha256(file) != digest:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} does not match its SHA-256.")


def list_checkpoints(root: Path) -> list[Path]:
    """Returns the step folders under `root`, oldest first, ignoring other names and links."""
    entries = root.iterdir() if root.is_dir() else ()
    found = [entry for entry in entries if STEP_NAME.fullmatch(entry.name) and not entry.is_symlink()]
    return sorted((entry for entry in found if entry.is_dir()), key=lambda entry: int(entry.name[5:]))


def newest_verified(root: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint under `root` that passes `verify`, and the error of each newer one."""
    complaints: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        try:
            verify(folder)
            return folder, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def recover_newest(root: Path) -> tuple[Path | None, list[str]]:
    """Deletes what a killed writer left under `root`; returns the same as `newest_verified`.

    Newer, damaged ones are set aside under another name, so that they do not count towards `keep_last`.
    """
    storage.remove_unfinished(root, UNFINISHED_NAME)
    folder, complaints = newest_verified(root)
    if folder is None:
        return None, complaints
    folders = list_checkpoints(root)
    for damaged in folders[folders.index(folder) + 1 :]:
        damaged.rename(damaged.with_name(f"{damaged.name}.damaged-{uuid.uuid4().hex[:8]}"))
    return folder, [f"{text} It is set aside." for text in complaints]


def newest_hashes(root: Path) -> dict[str, Any]:
    """Returns name and file hashes of the newest checkpoint under `root`; {} if there is none."""
    for folder in list_checkpoints(root)[-1:]:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {"checkpoint": folder.name, "sha256": {name: facts["sha256"] for name, facts in files.items()}}
    return {}


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint folder at `path`: itself, or the newest verified one of a run."""
    if (path / ".metadata").exists():
        raise CheckpointError(
            f"{path} is a torch.distributed.checkpoint folder, which is not opened: its .metadata is a pickle and can "
            "run any code. Name a step-... folder, a .safetensors file or a .pt file."
        )
    if (path / MANIFEST).is_file() or (STEP_NAME.fullmatch(path.name) and path.is_dir()):
        verify(path)
        return path
    for root in (path / "checkpoints", path):
        folder, complaints = newest_verified(root)
        if folder is not None:
            for text in complaints:
                log.warning("%s Taking %s instead.", text, folder.name)
            return folder
        if complaints:
            raise CheckpointError(complaints[0])
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist.")
    raise CheckpointError(f"{path} holds no checkpoint: expected a step-... folder, a run folder or a .pt file.")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads and verifies a training checkpoint."""
    verify(folder)
    state = read_state(folder)
    tensors = {name: read_tensors(folder / f"{name}.safetensors") for name in GROUPS}
    try:
        return Checkpoint(step=state.pop("step"), samples_seen=state.pop("samples_seen"), state=state, **tensors)
    except KeyError as error:
        raise CheckpointError(f"{folder / 'state.json'} lacks {error}; the checkpoint cannot be resumed.") from None


def read_config(folder: Path) -> Config:
    """Returns the configuration in a checkpoint folder."""
    return load_config(folder / "config.yaml", saved=True)


def weights_file(folder: Path, weights: str) -> Path:
    """Returns the file of the `ema` or `raw` weights in a checkpoint folder."""
    return folder / f"{'ema' if weights == 'ema' else 'model'}.safetensors"


def _prune(newest: Path, keep_last: int, keep_every: int) -> None:
    """Deletes all but `newest`, the `keep_last - 1` before it and those at multiples of `keep_every`.

    A folder is renamed first, so that a kill leaves no partial checkpoint under a final name.
    """
    folders = list_checkpoints(newest.parent)
    for folder in folders[: max(0, folders.index(newest) + 1 - keep_last)]:
        if keep_every and int(folder.name[5:]) % keep_every == 0:
            continue
        try:
            shutil.rmtree(folder.rename(_aside(folder)))
        except OSError as error:
            log.warning("old checkpoint %s cannot be deleted: %s", folder, error.strerror or error)


def space_warning(root: Path, needed: int) -> str | None:
    """Returns a sentence if the file system of `root` has less than 1.1 x `needed` bytes free, or None."""
    free = free_bytes(root)
    if free >= 1.1 * needed:
        return None
    return f"{root} has {gigabytes(free)} free, and a checkpoint takes {gigabytes(needed)}: make room."


class CheckpointWriter:
    """Rank 0's writer of a run's checkpoints; with `train.async_checkpoint` it writes in a background thread.

    `failure` keeps the message of a failed write until the run reads it; the last good checkpoint and `latest` stay
    unchanged.
    """

    def __init__(self, root: Path, config: Config) -> None:
        self.root = root
        self.config = config
        self.failure: str | None = None
        self._thread: threading.Thread | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Waits for the previous write, then writes `checkpoint`, whose tensors must no longer change."""
        self.wait()
        if self.config.train.async_checkpoint:
            self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint writer")
            self._thread.start()
        else:
            self._write(checkpoint)

    def wait(self) -> None:
        """Waits for a write in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        train = self.config.train
        try:
            recreate_checkpoints(self.root)
            if warning := space_warning(self.root, checkpoint.num_bytes):
                log.warning(warning)
            save_checkpoint(checkpoint, self.config, self.root, train.keep_last, train.keep_every)
        except CheckpointError as error:  # not caused by a full disk
            self.failure = str(error)
        except Exception as error:  # safetensors and torch raise their own types on a full disk
            try:
                free = gigabytes(free_bytes(self.root))
            except OSError as unknown:
                free = f"an unknown amount ({unknown})"
            self.failure = (
                f"the checkpoint of step {checkpoint.step} in {self.root} could not be written: {error} "
                f"(it takes {gigabytes(checkpoint.num_bytes)}, {free} free)"
            )


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint's state.json; CheckpointError if its step or class names are invalid."""
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{file} is missing or not JSON.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} is not a JSON object.")
    _check_step(state, file)
    names = state.get("class_names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: class_names must be a list of names; copy the checkpoint again.")
    return state


def _check_step(content: dict[str, Any], file: Path) -> None:
    step = content.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{file}: step must be a whole number from 0, not {step!r}; copy the checkpoint again.")


def read_tensors(file: Path) -> dict[str, Tensor]:
    require(file.is_file(), f"{file.parent} is not a training checkpoint: {file.name} is missing.")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def content_sha256(module: nn.Module) -> str:
    """Returns the SHA-256 of a module's tensor names and values, whichever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
