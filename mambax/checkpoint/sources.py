"""Where checkpoint files come from: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn, Protocol

from mambax.paths import path_of

CONFIG = "config.json"
MISTRAL_CONFIG = "params.json"
"""What Mistral calls a ``config.json``."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Source(Protocol):
    """A set of files, found by name."""

    @property
    def name(self) -> str: ...  # as the user wrote it

    def find(self, file: str) -> Path | None: ...  # the path of a file that is now here; None when there is none

    def describe(self) -> str: ...  # what is there, for the message that something is not


def open_source(
    repo_or_folder: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Source:
    """The folder of this path if there is one, else the repository of this name.

    Args:
        repo_or_folder: a path, or ``"owner/name"``.
        revision: a branch, a tag or a commit of the repository.
        local_files_only: use what has been downloaded before, and no network.

    Raises:
        ValueError: for what is not a path or a name, and for an empty one.
        FileNotFoundError: when it is neither.
        NotADirectoryError: for the path of a file.
    """
    path = path_of(repo_or_folder, "the folder or repository")
    name = os.fspath(repo_or_folder)
    if path.is_dir():
        return Folder(path)
    if path.exists():
        raise NotADirectoryError(
            f"{name}: expected a folder with {CONFIG} and weights, found a file; pass its folder"
        )
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    if not is_repo or isinstance(repo_or_folder, Path):
        raise FileNotFoundError(
            f"{name}: no such folder; expected a folder with {CONFIG} and weights, or a repository 'owner/name'"
        )
    return HubRepo(name, revision, local_files_only)


def find_config(source: Source) -> Path:
    """The file that says what the model is: :data:`CONFIG`, else :data:`MISTRAL_CONFIG`.

    Raises:
        FileNotFoundError: when there is neither.
    """
    path = source.find(CONFIG) or source.find(MISTRAL_CONFIG)
    if path is None:
        raise FileNotFoundError(
            f"{source.name}: no {CONFIG}; expected a folder with {CONFIG} and weights; {source.describe()}"
        )
    return path


class Folder:
    """Files in a local folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path

    def find(self, file: str) -> Path | None:
        """The path of a file, or None.

        Raises:
            IsADirectoryError: when a folder has the name of the file.
        """
        path = self.path / file
        if path.is_dir():
            raise IsADirectoryError(f"{path}: expected a file, found a folder; put the file in its place")
        return path if path.is_file() else None

    def describe(self) -> str:
        """The names of some files."""
        names = sorted(path.name for path in self.path.iterdir())
        return "found " + (", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing")


class HubRepo:
    """Files of a repository on the hub, each downloaded when it is asked for, through huggingface_hub's cache.

    Args:
        name: ``"owner/name"``.
        revision: a branch, a tag or a commit.
        local_files_only: use the cache alone.
    """

    def __init__(self, name: str, revision: str | None, local_files_only: bool) -> None:
        self.name = name
        self.revision = revision
        self.local_files_only = local_files_only
        self._missing: str | None = None

    def find(self, file: str) -> Path | None:
        """The path of a file in the cache; None when the repository, or offline the cache, does not have it.

        Raises:
            FileNotFoundError: when there is no such repository or revision, or no access to it.
            ConnectionError: when the hub cannot be reached.
        """
        from huggingface_hub import errors, hf_hub_download

        try:
            found = hf_hub_download(self.name, file, revision=self.revision, local_files_only=self.local_files_only)
        except errors.LocalEntryNotFoundError as error:
            self._missing = f"it is not in the local cache, and was not downloaded ({_first_line(error)})"
            if file == CONFIG:
                self._unreachable(error)
            return None
        except errors.GatedRepoError as error:
            raise FileNotFoundError(
                f"{self.name}: access to this repository must be granted; accept its terms on the hub and log in "
                "with 'hf auth login'"
            ) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            revision = f" with revision {self.revision!r}" if self.revision else ""
            raise FileNotFoundError(
                f"{self.name}: no such repository{revision} on the hub, and no such folder here. Check the "
                "spelling; for a private one log in with 'hf auth login'"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except (OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage] of its HTTP library
            self._unreachable(error)
        path = Path(found)
        if _COMMIT.fullmatch(path.parent.name):
            self.revision = path.parent.name  # so that all files are of one commit, and nothing asks the hub again
        return path

    def describe(self) -> str:
        """Why a file is missing."""
        return self._missing or "the repository does not have it"

    def _unreachable(self, error: Exception) -> NoReturn:
        kind = FileNotFoundError if self.local_files_only else ConnectionError
        why = "is not in the local cache" if self.local_files_only else "cannot be reached on the hub"
        raise kind(
            f"{self.name}: this repository {why} ({_first_line(error)}). Check the spelling and the network "
            "(HF_HUB_OFFLINE and local_files_only must be off), or pass a local folder with "
            f"{CONFIG} and the weights"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_shard_name(name: object, where: str) -> str:
    """A file name taken from an index, which must stay within the checkpoint.

    Raises:
        ValueError: for anything but the plain name of a ``.safetensors`` or ``.bin`` file.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,250}\.(safetensors|bin)", name):
        raise ValueError(
            f"{where}: {str(name)[:120]!r} is not the name of a shard; expected a plain file name such as "
            "'model-00001-of-00002.safetensors', without folders"
        )
    return name
