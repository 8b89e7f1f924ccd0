"""Shared by all command lines: arguments, exit codes, errors as one sentence."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import re
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from common.text import printable

from . import launchers
from .errors import INTERRUPTED_EXIT, MISTAKE_EXIT, TrainingAborted
from .signals import die_with_parent

# loggers whose warnings, about optional packages, do not concern the user
NOISY = ("bitsandbytes", "diffusers.quantizers", "torch.utils._pytree")
PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def report_early(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Reports an error during imports, as `sys.excepthook`: one line for Ctrl-C and missing packages."""
    if not isinstance(error, KeyboardInterrupt | ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    interrupted = isinstance(error, KeyboardInterrupt)
    sys.stderr.write("interrupted\n" if interrupted else f"error: {_sentence(error)}\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED_EXIT if interrupted else MISTAKE_EXIT)


if "TORCHELASTIC_RUN_ID" in os.environ:  # here: scripts import this module before the slow ones
    die_with_parent()
sys.excepthook = report_early


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls `main(argv)` and exits with its code; a user error prints one sentence and exits with code 2.

    LATTE_TRACEBACK=1 prints the traceback too.
    """
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        launchers.adopt_launcher(os.environ)
        code = main(sys.argv[1:])
    except (ValueError, OSError, ModuleNotFoundError, TrainingAborted) as error:
        if os.environ.get("LATTE_TRACEBACK"):
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        if rank != "0":  # prints an error of all ranks once: torchrun stops the others when rank 0 exits
            time.sleep(2)
        sys.stdout.flush()
        sys.stderr.write(f"error{where}: {printable(_sentence(error))}\n")
        code = leave(getattr(error, "exit_code", MISTAKE_EXIT))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = leave(INTERRUPTED_EXIT)
    except Exception:
        traceback.print_exc()
        code = leave(1)
    sys.exit(leave(code or 0))


def leave(code: int) -> int:
    """Returns `code`; exits with it at once, without finalizing the interpreter, if a launcher started this process.

    Finalizing may deadlock: it waits for a gloo thread, which waits for the interpreter lock (GIL).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or launchers.ADOPTED in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _sentence(error: BaseException) -> str:
    """Returns the message of `error`; for a missing package, how to install it."""
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    package = (error.name or "").partition(".")[0]
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    names = {extra: [re.match(r"[\w.-]+", each)[0] for each in needs] for extra, needs in extras.items()}  # type: ignore[index]
    extra = next((extra for extra, needs in names.items() if package.replace("_", "-") in needs), None)
    alone = f", `pip install '.[{extra}]'` installs the extra that it belongs to" if extra else ""
    return f"the Python package {package!r} is not installed: `make setup` installs everything{alone}."


def config_parser(description: str, usage: str) -> argparse.ArgumentParser:
    """Returns a parser with `--config FILE` and trailing `key=value` overrides."""
    parser = argparse.ArgumentParser(
        description=description, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; default: all default values")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override, e.g. optim.learning_rate=2e-4")
    return parser
