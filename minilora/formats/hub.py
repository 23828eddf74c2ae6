"""A model by its name on the Hugging Face hub: its folder in the local cache, or a download.

A local folder of that name comes first. The cache is that of the package huggingface_hub, which
transformers fills, too:

    $HF_HUB_CACHE, $HF_HOME/hub, $XDG_CACHE_HOME/huggingface/hub or ~/.cache/huggingface/hub
        models--org--name/
            refs/main              the commit that `main` means, 40 hexadecimal digits
            snapshots/<commit>/    the files, as symbolic links into blobs/

Nothing is downloaded unless it is asked for, and then only by that package.

    find_model   the folder of a model, given as a folder, org/name or org/name@revision
    model_name   org/name for a folder of the cache
"""

from __future__ import annotations

import errno
import os
import string
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, FormatError
from .checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_index
from .disk import PathLike, open_regular, quoted

MAIN = "main"
MAX_PART = 96  # characters, the hub's limit
WORD = frozenset(string.ascii_letters + string.digits + "_")  # begin and end a part of a name
HEXADECIMAL = frozenset("0123456789abcdef")
COMMIT_DIGITS = 40
MAX_REFERENCE = 64  # bytes of a file of refs/: a commit and white space
REPOSITORY = "models--"  # begins the name of a model's folder in the cache

# What a download fetches: weights without code, configurations, and the tokenizer.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")


class HubName(NamedTuple):
    """A model on the hub, `org/name` (`name` for a few old ones), and a branch, tag or commit."""

    name: str
    revision: str

    @property
    def folder(self) -> str:
        """Its folder in the cache."""
        return os.path.join(cache_folder(), REPOSITORY + self.name.replace("/", "--"))


def read_name(text: str) -> HubName | None:
    """The model that `org/name` or `org/name@revision` names; None if the hub has no such names.

    Each part is safe as the name of a folder.
    """
    name, has_revision, revision = text.partition("@")
    parts = name.split("/")
    is_name = len(parts) <= 2 and all(map(_is_part, parts))
    if not is_name or "--" in name or name.endswith(".git"):
        return None
    if not has_revision:
        return HubName(name, MAIN)
    return HubName(name, revision) if all(map(_is_part, revision.split("/"))) else None


def _is_part(text: str) -> bool:
    """Whether a text has only ASCII letters, digits, `_`, `-` and `.`, the last two inside."""
    if not 1 <= len(text) <= MAX_PART or ".." in text:
        return False
    return {text[0], text[-1]} <= WORD and {*text} <= WORD | {"-", "."}


def cache_folder() -> str:
    """The folder of the hub's cache, as the package huggingface_hub finds it."""
    given = os.environ.get
    home = given("HF_HOME") or os.path.join(given("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = given("HF_HUB_CACHE") or given("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.expandvars(os.path.expanduser(folder))


def find_model(model: PathLike, download: bool = False) -> str:
    """The folder of a model, which is `model` itself if there is a file or folder of that name.

    model      a folder, or `org/name` or `org/name@revision` on the hub
    download   fetch what the cache does not have

    FileNotFoundError says where it was looked for. FormatError for a damaged cache; ConfigError
    without the package that downloads; OSError for a download that fails.
    """
    text = os.fspath(model)
    if os.path.lexists(text):
        return text
    wanted = read_name(text)
    if wanted is None:
        raise FileNotFoundError(
            errno.ENOENT,
            "no such model folder, and not a model's name on the hub (nothing is downloaded): give "
            "a folder, or org/name",
            text,
        )
    folder = _find_in_cache(wanted)
    if download and (folder is None or not _is_whole(folder)):
        return _download(wanted)
    if folder is None:
        raise FileNotFoundError(
            errno.ENOENT,
            f"no such model folder, and {quoted(wanted.folder)} in the hub's cache has no snapshot "
            f"of {quoted(wanted.revision, 40)} (nothing is downloaded): give a folder, or "
            "--download (in Python download=True) to fetch it",
            text,
        )
    return folder


def model_name(folder: PathLike) -> str:
    """`org/name` for a snapshot of the hub's cache, which others know it by; else the path."""
    snapshots = Path(folder).parent
    repository = snapshots.parent.name
    name = repository.removeprefix(REPOSITORY).replace("--", "/")
    is_snapshot = snapshots.name == "snapshots" and repository.startswith(REPOSITORY)
    return name if is_snapshot and read_name(name) else os.fspath(folder)


# ---- the cache -----------------------------------------------------------------------------------


def _find_in_cache(wanted: HubName) -> str | None:
    """The snapshot of a model in the cache, or None."""
    commit = wanted.revision
    if not _is_commit(commit):
        reference = os.path.join(wanted.folder, "refs", *commit.split("/"))
        if not os.path.lexists(reference):
            return None
        commit = _read_commit(reference)
    snapshot = os.path.join(wanted.folder, "snapshots", commit)
    return snapshot if os.path.isdir(snapshot) else None


def _read_commit(path: str) -> str:
    """The commit in a file of refs/. FormatError if it holds anything else, such as a path."""
    with open_regular(path) as file:
        content = file.read(MAX_REFERENCE + 1)
    commit = content.decode("ascii", "replace").strip()
    if len(content) > MAX_REFERENCE or not _is_commit(commit):
        raise FormatError(
            f"{quoted(path)} must hold a commit of {COMMIT_DIGITS} hexadecimal digits, it holds "
            f"{quoted(commit)}: remove the file and download the model again"
        )
    return commit


def _is_commit(text: str) -> bool:
    return len(text) == COMMIT_DIGITS and {*text} <= HEXADECIMAL


def _is_whole(folder: str) -> bool:
    """Whether a snapshot has a configuration and all weights: a download may have been stopped."""

    def has(name: str) -> bool:
        return os.path.exists(os.path.join(folder, name))

    if not has(CONFIG_FILE):
        return False
    if has(WEIGHTS_FILE) or not has(INDEX_FILE):
        return has(WEIGHTS_FILE)
    return all(map(has, read_index(Path(folder, INDEX_FILE))))


def _download(wanted: HubName) -> str:
    """The snapshot of a model that the package huggingface_hub fetches into the cache."""
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            "--download needs the package 'huggingface_hub': pip install -e .[hf]"
        ) from None
    place = {"revision": wanted.revision, "cache_dir": cache_folder()}
    try:
        folder: str = huggingface_hub.snapshot_download(
            wanted.name, allow_patterns=list(PATTERNS), **place
        )
    except Exception as error:  # of the package, of those that it connects with, or of the system
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"{wanted.name} at {wanted.revision} could not be downloaded: "
            f"{type(error).__name__}: {reason}"
        ) from error
    return folder
