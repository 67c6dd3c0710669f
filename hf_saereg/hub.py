"""To the Hub and back: `upload` a folder, `fetch` files of a repository.

Notable:
- one upload is one commit: whatever fails on the way, the repository is what it was before, and the
  local folder is only read
- every published head names the repository as its model; heads and weight shards that the folder
  no longer has are deleted there in the same commit
- what goes wrong between here and the Hub ends in one sentence, a `HubError`
- it knows files, not models: `checkpoint`, `heads.folder` and `modeling` read what it fetches
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)

from hf_saereg.errors import UserError
from hf_saereg.layout import (
    CONFIG_FILE,
    HEADS_FOLDER,
    MODEL_WEIGHTS,
    is_published,
    published_files,
)

# options of `from_pretrained` that say where on the Hub, and how, files are found
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


class HubError(UserError):
    """Something did not get to or from the Hub; the message says why, and how to go on."""


@dataclass
class PushOptions:
    """How a folder is published, as far as a command line may say it."""

    private: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch to push to, made if need be; main by default."}
    )
    commit_message: str = field(
        default="Upload model and SAEs", metadata={"help": "Message of the commit."}
    )
    create_pr: bool = field(
        default=False, metadata={"help": "Open a pull request, leave the branch as it is."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Of the model, as the Hub abbreviates it; by default that of its card."},
    )


@dataclass
class PushArguments(PushOptions):
    """How a folder is published."""

    token: str | None = field(
        default=None, repr=False, metadata={"help": "Access token; the stored one by default."}
    )


class Fetched(NamedTuple):
    """Files of a repository in the local cache.

    Attributes:
        folder: laid out as the repository.
        commit: which they are from.
    """

    folder: Path
    commit: str


def make_repository(repo: str, arguments: PushArguments) -> str:
    """Make a repository unless it is there, so that a refusal shows before any long work.

    Args:
        repo: `user/name`, or `name` in one's own namespace.
        arguments: `private` and `token` of it.

    Returns:
        Its full name.

    Raises:
        HubError: if the Hub cannot be reached or refuses, or the repository is there and as public
            or private as it should not be.
    """
    with in_one_sentence("making the repository", repo, aftermath="nothing was published"):
        api = HfApi(token=arguments.token)
        repo = api.create_repo(repo, private=arguments.private, exist_ok=True).repo_id
        if arguments.private is not None:
            _check_visibility(repo, arguments.private, bool(api.model_info(repo).private))
    return repo


def _check_visibility(repo: str, wanted: bool, is_private: bool) -> None:
    if wanted != is_private:
        found, other = ("private", "public") if is_private else ("public", "private")
        raise HubError(
            f"{repo} is there already and {found}; make it {other} in its settings on the Hub, or "
            "leave out `private`; nothing was published."
        )


def upload(folder: Path, repo: str, arguments: PushArguments) -> CommitInfo:
    """Commit the published files of a folder; `cards.publish` checks them and writes the card.

    Args:
        folder: of a checkpoint.
        repo: `user/name`, which is there.
        arguments: how.

    Returns:
        The commit; as text its address.

    Raises:
        HubError: if the Hub cannot be reached or refuses.
    """
    names = published_files(folder)
    aftermath = "nothing was published, and no file here was lost"
    with in_one_sentence(f"pushing {folder}", repo, arguments.revision, aftermath):
        api = HfApi(token=arguments.token)
        if arguments.revision is not None:
            api.create_branch(repo, branch=arguments.revision, exist_ok=True)
        stale = _stale_files(api.list_repo_files(repo, revision=arguments.revision), names)
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, _content(folder / name, repo)) for name in names]
        return api.create_commit(
            repo,
            operations,
            commit_message=arguments.commit_message,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
        )


def _stale_files(published: Iterable[str], names: Sequence[str]) -> list[str]:
    """Heads and model weights in the repository that the folder has not."""
    replaced = (*MODEL_WEIGHTS, f"{HEADS_FOLDER}/*")
    return [
        name
        for name in published
        if name not in names
        and is_published(name)
        and any(fnmatchcase(name, pattern) for pattern in replaced)
    ]


def _content(path: Path, repo: str) -> Path | bytes:
    if path.name != CONFIG_FILE:
        return path
    cfg = json.loads(path.read_text(encoding="utf-8"))
    cfg.setdefault("metadata", {})["model_name"] = repo
    return json.dumps(cfg, indent=2).encode()


def fetch(repo: str, patterns: Iterable[str], **options: Any) -> Fetched:
    """Download those files of a repository that match; what is in the cache is not asked for again.

    Args:
        repo: on the Hub.
        patterns: of names, as `fnmatch` takes them.
        **options: those of `HUB_OPTIONS`.

    Raises:
        HubError: if the Hub cannot be reached, refuses, or has no such repository or revision.
    """
    aftermath = "what was downloaded so far is kept in the cache"
    with in_one_sentence("downloading", repo, options.get("revision"), aftermath):
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns), **options))
    return Fetched(folder, folder.name)  # …/snapshots/COMMIT


@contextmanager
def in_one_sentence(
    doing: str, repo: str, revision: str | None = None, aftermath: str = "nothing was lost"
) -> Iterator[None]:
    """Turn what goes wrong on the way to the Hub into one sentence; other errors pass.

    Args:
        doing: what is tried, as in "…, while pushing runs/demo".
        repo: with which repository.
        revision: of it.
        aftermath: in what state the failure leaves things.

    Raises:
        HubError: if the Hub cannot be reached, refuses, or has no such repository or revision.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, repo, revision)
        if reason is None:
            raise
        raise HubError(f"While {doing}: {reason}; {aftermath}.") from error


def _reason(error: Exception, repo: str, revision: str | None) -> str | None:
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, RevisionNotFoundError):
            return f"{repo} has no revision {revision!r}"
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, repo)
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return f"{repo} is not in the cache, and the Hub is switched off (HF_HUB_OFFLINE)"
        if isinstance(cause, HTTPError):
            kind = type(cause).__name__
            return f"the connection to {constants.ENDPOINT} failed ({kind}), so try again later"
    for cause in chain:
        if isinstance(cause, LocalEntryNotFoundError):
            return f"{repo} is not, or not whole, in the cache, so leave out local_files_only"
        if isinstance(cause, HFValidationError):
            return f"{repo!r} is neither a folder nor the name of a repository (user/name)"
    return None


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"{constants.ENDPOINT} refused access to {repo} ({status}), so check its name, log in "
            "with `hf auth login`, or give a token that may do this"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} lacks {PurePosixPath(error.response.url.path).name}"
    if status == 404:
        return f"{constants.ENDPOINT} has no repository {repo} that you may see (404)"
    said = " ".join((error.server_message or "").split())
    return f"{constants.ENDPOINT} answered {status}{said and f' ({said})'}, so try again later"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:  # Python keeps these chains free of cycles
        yield error
        error = error.__cause__ or error.__context__
