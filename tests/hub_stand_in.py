"""A stand-in for the hub: huggingface_hub's functions, called with its own signatures, on folders of this machine."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects


class Hub:
    """Commits by repository and branch or tag, each a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits: dict[tuple[str, str], Path] = {}

    def add_folder(self, repo: str, folder: str | Path, revision: str = "main") -> str:
        """Commits the files of a folder; returns the hash."""
        commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
        self.commits[repo, revision] = shutil.copytree(folder, self.root / "hub" / repo / commit)
        return commit

    def download(self, repo: str, *, revision: str | None = None, allow_patterns: Any = None) -> str:
        if (repo, revision or "main") not in self.commits:
            known = repo in {name for name, _ in self.commits}
            raise (RevisionNotFoundError if known else RepositoryNotFoundError)("not there", response=MagicMock())
        commit = self.commits[repo, revision or "main"]
        files = [file.relative_to(commit).as_posix() for file in commit.rglob("*") if file.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            target = self.root / "cache" / repo / commit.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(commit / name, target)
        return str(self.root / "cache" / repo / commit.name)

    def upload(self, api: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        return f"https://hub/{repo_id}/commit/{self.add_folder(repo_id, folder_path)}"


@contextmanager
def local_hub(root: Path) -> Iterator[Hub]:
    """A hub until the end of the block."""
    hub = Hub(root)
    with (
        patch("huggingface_hub.snapshot_download", autospec=True, side_effect=hub.download),
        patch.object(HfApi, "create_repo", autospec=True),
        patch.object(HfApi, "upload_folder", autospec=True, side_effect=hub.upload),
    ):
        yield hub
