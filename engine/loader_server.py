"""Imports for the fork server of the data loaders, which preloads this module; nothing else imports it.

Ties the server to the training process before the slow imports, then imports once what every loader worker needs.
Each worker holds a pipe of the server open, so both would outlive a killed training process otherwise.
"""

import os

from .signals import LOADER_PARENT, die_with_parent

die_with_parent(int(os.environ.get(LOADER_PARENT, "0")) or None)

import torch  # noqa: E402, F401

import datasets.clips  # noqa: E402, F401

from . import stream  # noqa: E402, F401
