"""Imported by the fork server of the data loaders, and by nothing else: it forks workers that are ready to read.

It imports once what every worker needs, and dies with the training process. Without that both would outlive a
killed one: the server waits for its workers, and they watch the server.
"""

import torch  # noqa: F401

import datasets.clips  # noqa: F401

from . import stream  # noqa: F401
from .signals import die_with_parent

die_with_parent()
