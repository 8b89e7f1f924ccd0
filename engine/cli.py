"""What every command line of the repository shares: arguments, and errors as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from .errors import TrainingAborted


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main(argv)` and exit with its code; a user's mistake ends in one sentence and exit code 2.

    ValueError and OSError are what the project raises for bad keys, files and values; TrainingAborted (exit
    code 3) is a run that cannot go on. Set LATTE_TRACEBACK=1 to see where one came from.
    """
    try:
        code = main(sys.argv[1:])
    except (ValueError, OSError, TrainingAborted) as error:
        if os.environ.get("LATTE_TRACEBACK"):
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        sys.stdout.flush()
        sys.stderr.write(f"error{where}: {error}\n")
        code = getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    sys.exit(code or 0)


def config_parser(description: str, usage: str) -> argparse.ArgumentParser:
    """A parser with `--config FILE` and trailing `key=value` overrides."""
    parser = argparse.ArgumentParser(
        description=description, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without one the defaults are used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override, e.g. optim.learning_rate=2e-4")
    return parser
