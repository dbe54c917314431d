"""Models on the Hugging Face Hub: `hf://OWNER/NAME` -> a folder here, and back.

Through huggingface_hub alone: its cache, its token (`hf auth login`, HF_TOKEN), its HF_ENDPOINT and
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flap_fast.checks import ConfigError, in_one_line, require
from flap_fast.places import require_on_disk

# One slash: `Path` makes it of two.
_NAME = re.compile(r"hf:/{1,3}(?P<repo>[^@]*?)/*(?:@(?P<revision>.*))?", re.IGNORECASE)
# What opens a model, of this project's and of transformers' folders.
_FILES = (
    *("config.yaml", "SHA256SUMS", "model.safetensors", "audio.safetensors", "text/*"),
    "classes.txt",
    *("unused.safetensors", "origin.json", "config.json", "*processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
_PICKLE = "pytorch_model.bin"  # where there are no safetensors; read as tensors only
_LOGIN = "log in with: hf auth login"


class Repository(NamedTuple):
    """A model on the Hub."""

    repo: str
    """OWNER/NAME."""
    revision: str | None
    """A branch, a tag or a commit; None for the newest."""

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


def on_hub(path: str | Path) -> bool:
    """Whether a model's path names one on the Hub."""
    return str(path)[:4].lower() == "hf:/"


def local_folder(path: str | Path, files: tuple[str, ...] = ()) -> Path:
    """The folder of a model: a path of this machine as it is, a model on the Hub downloaded.

    Args:
        files: those of the Hub's that are wanted, if not all.

    Raises:
        ConfigError: another URL; no such repository or revision, no access to it, or no connection.
    """
    if not on_hub(path):
        require_on_disk("a model", path)
        return Path(path)
    found = _NAME.fullmatch(str(path))
    valid = found is not None and _is_repo(found["repo"])
    require(valid, "a model on the Hub", "be hf://OWNER/NAME or hf://OWNER/NAME@REVISION", path)
    assert found is not None
    repository = Repository(found["repo"], found["revision"])
    with _one_sentence(repository):
        folder = _snapshot(repository, files or _FILES)
        weights = bool(files) or any(
            (folder / name).is_file() for name in _FILES if name.endswith(".safetensors")
        )
        return folder if weights else _snapshot(repository, (*_FILES, _PICKLE))


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder as a model's new commit, the repository made if need be; returns its URL.

    Raises:
        ConfigError: no token that may write there, a card that the Hub refuses, or no connection.
    """
    from huggingface_hub import HfApi

    check_repo_name(repo)
    again = f"then upload {folder}, which is complete, with: hf upload {repo} {folder}"
    with _one_sentence(Repository(repo, None), again):
        api = HfApi(library_name="flap_fast")
        api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Model exported by flap_fast"
        )
        return f"{api.endpoint}/{repo}"


def check_repo_name(repo: str) -> None:
    """Raise `ConfigError` unless it is OWNER/NAME."""
    require(_is_repo(repo), "--push", "be OWNER/NAME on the Hub", repo)


def _is_repo(repo: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return repo.count("/") == 1


def _snapshot(repository: Repository, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository.repo,
            revision=repository.revision,
            allow_patterns=list(files),
            library_name="flap_fast",
        )
    )


@contextmanager
def _one_sentence(repository: Repository, again: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into a `ConfigError` with its remedy.

    Args:
        again: how to go on once the cause is gone.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The client's own errors too, which are of httpx or of requests.
    known: tuple[Any, ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
    try:
        yield
    except known as error:
        if isinstance(error, ConfigError):
            raise
        said = _said(repository, error)
        raise ConfigError(f"{said}; {again}" if again else said) from None


def _said(repository: Repository, error: Exception) -> str:
    """What an error means for a repository, and its remedy."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception):
        causes.append(cause)
    status = next((c.response.status_code for c in causes if isinstance(c, HfHubHTTPError)), None)
    name = str(repository)
    if isinstance(error, RevisionNotFoundError):
        remedy = "leave @REVISION out for the newest"
        return f"{name} must name a branch, a tag or a commit that exists, got none; {remedy}"
    if isinstance(error, GatedRepoError):
        page = f"{HfApi().endpoint}/{repository.repo}"
        rule = "must be a repository whose conditions you accepted"
        return f"{name} {rule}, got {status}; accept them at {page}, then {_LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        rule = "must be a repository that exists and that you have access to"
        return f"{name} {rule}, got {status}; check the name, or for a private one {_LOGIN}"
    if status in (401, 403):
        rule = "must be a repository that your token has access to"
        return f"{name} {rule}, got {status}; {_LOGIN}"
    if constants.HF_HUB_OFFLINE:
        remedy = "unset it, or give a folder that you downloaded"
        return f"{name} must be in the cache where HF_HUB_OFFLINE is set, got no copy; {remedy}"
    if isinstance(error, ValueError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{name} is refused by the Hub: {in_one_line(error)}"
    if status is not None:
        return f"{name} cannot be reached: the Hub answered {status}; try again later"
    return f"{name} cannot be reached: {in_one_line(causes[-1])}; check the connection"
