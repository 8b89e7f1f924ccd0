"""Take the weights alone out of an official .pt file that holds other Python objects too, as safetensors.

    python -m tools.convert_checkpoint ucf101.pt --sha256 HASH [-o ucf101.safetensors] [--weights ema]

HASH is what the file's maker states (Hugging Face shows it on the file's page); a file of any other hash is
not opened. Of the file only tensors are taken: settings beside them (argparse, OmegaConf) are passed over, and
none of their code runs; a file with anything else in it is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import cli


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="an official .pt file")
    parser.add_argument("--sha256", required=True, action="append", metavar="HASH", help="of a file to trust")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: beside it, as .safetensors")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="which weights (default: ema)")
    arguments = parser.parse_args(argv)
    check_hash(arguments.checkpoint, arguments.sha256)

    from safetensors.torch import save_file

    from common.storage import write_atomically
    from models.convert import read_state_dict
    from models.pickled import SETTINGS

    target = arguments.output or arguments.checkpoint.with_suffix(".safetensors")
    weights = read_state_dict(arguments.checkpoint, arguments.weights, ignored=SETTINGS)
    own = {name: value.contiguous().clone() for name, value in weights.items()}  # the format shares no memory
    write_atomically(target, lambda temporary: save_file(own, temporary))
    print(f"{target}: {len(own)} tensors")
    return 0


def check_hash(file: Path, allowed: list[str]) -> None:
    """Refuse a file whose SHA-256 is none of `allowed`.

    Raises:
        FileNotFoundError, ValueError: one sentence with both hashes.
    """
    import hashlib

    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {file}")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found not in [each.strip().lower() for each in allowed]:
        raise ValueError(f"{file} is not opened: its SHA-256 is {found}, but --sha256 allows {', '.join(allowed)}.")


if __name__ == "__main__":
    cli.run(main)
