"""Preloaded by the data loaders' fork server; nothing else imports it.

Ties the server to the training process, then makes the slow imports that every loader worker needs. Untied, server and
workers would outlive a killed training process, because each worker holds a pipe of the server open.
"""

import os

from .signals import LOADER_PARENT, die_with_parent

die_with_parent(int(os.environ.get(LOADER_PARENT, "0")) or None)

import torch  # noqa: E402, F401

import datasets.clips  # noqa: E402, F401

from . import stream  # noqa: E402, F401
