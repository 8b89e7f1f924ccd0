"""Command-line tools, each a thin main over functions of the library; started as `python -m tools.NAME`."""

import engine.cli  # noqa: F401 - before the imports of a tool: a missing package or Ctrl-C there ends in one sentence
