"""A cache of the Hugging Face hub as its own client lays it out, filled without a network."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.file_download import repo_folder_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(home: Path, name: str, folder: Path, repo_type: str = "model") -> Path:
    """Copy a folder into the cache below `HF_HOME=home` as `name`; returns its snapshot."""
    cache = home / "hub"
    repository = cache / repo_folder_name(repo_id=name, repo_type=repo_type)
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(
            Path(*[".."] * (len(link.relative_to(repository).parts) - 1), "blobs", blob.name)
        )
    found = scan_cache_dir(cache)
    assert name in {repo.repo_id for repo in found.repos}, "the hub's client does not know it"
    assert not found.warnings
    return snapshot


def drop(snapshot: Path, name: str) -> None:
    """Remove a file from the cache, so that its link leads nowhere."""
    (snapshot / name).resolve().unlink()
