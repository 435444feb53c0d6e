"""The hub: a proven export as a repository of it, in one commit, private unless asked otherwise.

What can be refused is refused before an export is made: no token, a name that no repository has, a
repository that holds something else. Only files that a proof names are sent, and only as they were
when it was written. They become visible in a single commit: an upload that is interrupted changes
nothing, and can be repeated.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phitune.errors import ExportError, PhituneError, SettingsError, listing, without_tokens
from phitune.export.proof import PROOF_FILE, file_digest
from phitune.untrusted import read_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Made by the hub itself in every repository.
_OF_THE_HUB = (".gitattributes",)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub that an export goes to."""

    name: str
    public: bool
    revision: str | None  # its newest commit; None where it has to be made
    content: Mapping[str, str]  # SHA-256, or git's hash of a small file, by name

    @property
    def kind(self) -> str:
        return "public" if self.public else "private"


def open_repository(name: str, *, public: bool) -> Repository:
    """Looks where an export would go; changes nothing there.

    Raises:
        SettingsError: nobody is logged in, the token may only read, or the repository is public and
            that was not asked for (or the other way round).
        ExportError: the hub cannot be asked.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise SettingsError(f"--push {name}: HF_HUB_OFFLINE is set, so nothing can be uploaded")
    token = get_token()
    if not token:
        raise SettingsError(
            f"--push {name}: nobody is logged in at the hub; run hf auth login, or set HF_TOKEN to"
            " a token that may write"
        )
    api = HfApi(token=token)
    with _hub_errors(name):
        access = (api.whoami().get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise SettingsError(
                f"--push {name}: the token may only read; make one that may write on the hub's page"
                " of access tokens"
            )
        try:
            found = _read(api, name)
        except RepositoryNotFoundError:
            return Repository(name, public, None, {})
    if found.public and not public:
        raise SettingsError(
            f"--push {name}: this repository is public; add --public if everybody may have the"
            " export, or name another"
        )
    if public and not found.public:
        raise SettingsError(
            f"--push {name}: this repository is private, and phitune does not change that; leave"
            " out --public, or make it public on its page"
        )
    return found


def check_free(repository: Repository, *, replace: bool) -> None:
    """Refuses a repository with other content.

    Args:
        replace: it may be replaced.

    Raises:
        SettingsError: it holds files.
    """
    if repository.content and not replace:
        raise SettingsError(
            f"--push {repository.name}: the repository holds other files"
            f" ({', '.join(list(repository.content)[:3])}); name another, or replace all of them"
            " with --push_overwrite (the hub keeps the older commits)"
        )


def proven_files(folder: Path) -> dict[str, str]:
    """The files of an export with their SHA-256, the proof among them.

    Raises:
        SettingsError: it is no export, or is not what was proven any more.
    """
    if not (folder / PROOF_FILE).is_file():
        raise SettingsError(f"{folder}: is not an export (it has no {PROOF_FILE}); nothing is sent")
    proof = read_object(folder / PROOF_FILE, "")
    expected = proof.get("sha256")
    if not isinstance(expected, dict) or proof.get("passed") is not True:
        raise SettingsError(
            f"{folder}: its {PROOF_FILE} is no proof of these files (another version wrote it, or"
            " it was changed); export it again"
        )
    there = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    proof_path = there.pop(PROOF_FILE)
    found = {name: file_digest(path, hashlib.sha256()) for name, path in sorted(there.items())}
    problems = [f"{name}: is missing" for name in expected if name not in found]
    problems += [f"{name}: is not of the export" for name in found if name not in expected]
    problems += [
        f"{name}: was changed since"
        for name in found
        if found[name] != expected.get(name, found[name])
    ]
    if problems:
        raise SettingsError(
            f"{folder}: is not what was proven any more, so nothing is sent:\n{listing(problems)}"
        )
    return {**found, PROOF_FILE: file_digest(proof_path, hashlib.sha256())}


def is_there(repository: Repository, folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a repository holds exactly these files already."""
    return repository.content.keys() == files.keys() and not _differing(repository, folder, files)


def push(repository: Repository, folder: Path, files: Mapping[str, str]) -> str:
    """Sends the files in one commit, which replaces what was there, and compares what arrived.

    Returns: the address of the repository.

    Raises:
        ExportError: something failed; the repository is then as it was before.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    name = repository.name
    api = HfApi(token=get_token())
    with _hub_errors(name):
        if repository.revision is None:
            api.create_repo(name, private=not repository.public, exist_ok=True)
        additions = [CommitOperationAdd(file, str(folder / file)) for file in files]
        gone = [file for file in repository.content if file not in files]
        api.create_commit(
            name,
            [*additions, *(CommitOperationDelete(file) for file in gone)],
            commit_message="Add a model that was fine-tuned, exported and proven with phitune",
            # Who sent something else in the meantime does not lose it.
            parent_commit=repository.revision,
        )
        arrived = _read(api, name)
    if wrong := _differing(arrived, folder, files):
        raise ExportError(
            f"{name}: these files are not on the hub as they are here:\n{listing(wrong)}\nUpload"
            " them again."
        )
    return f"{api.endpoint}/{name}"


def _read(api: "HfApi", name: str) -> Repository:
    info = api.model_info(name, files_metadata=True)
    content = {
        file.rfilename: str(file.lfs["sha256"] if file.lfs else file.blob_id)
        for file in info.siblings or []
        if file.rfilename not in _OF_THE_HUB
    }
    return Repository(name, not info.private, info.sha, content)


def _differing(repository: Repository, folder: Path, files: Mapping[str, str]) -> list[str]:
    """Those of the files that the repository has not, or has otherwise."""
    return [
        file
        for file, sha256 in files.items()
        if repository.content.get(file) not in (sha256, _git_hash(folder / file))
    ]


def _git_hash(path: Path) -> str:
    size = path.stat().st_size
    return file_digest(path, hashlib.sha1(b"blob %d\0" % size))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What goes wrong between here and the hub, as one error without tokens."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except PhituneError:
        raise
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) == 401:
            raise SettingsError(
                f"--push {name}: the hub does not know this token, or it may not go there; run hf"
                " auth login again, or set HF_TOKEN"
            ) from None
        raise ExportError(f"--push {name}: the hub answered: {_said(error)}") from None
    except Exception as error:  # Each of its HTTP libraries has errors of its own.
        raise ExportError(
            f"--push {name}: the upload failed: {_said(error)}; what is on the hub was not changed"
        ) from None


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_tokens(" ".join(lines[:2]) or type(error).__name__)
