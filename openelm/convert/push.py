"""Publish a model folder on the Hugging Face hub: checked first, in one commit, and nothing that is no part of it."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from openelm.convert.extras import needed
from openelm.convert.hf import open_hf
from openelm.convert.source import Source
from openelm.errors import CheckpointError, ConfigError, OpenELMError, Stopped
from openelm.files.hashes import read_file
from openelm.files.published import MANIFEST, manifest_bytes, verify_folder
from openelm.model.folder import GENERATION, ORIGIN
from openelm.model.weights import INDEX, WEIGHTS, weight_files

CARD = "README.md"
_TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PARTS = ("config.json", GENERATION, ORIGIN, MANIFEST, INDEX, "*.safetensors", *_TOKENIZER, "*.jinja", "*_openelm.py")
"""What a model's repository holds besides texts for people; of these it holds what the folder holds, and no others."""
_FIX_LAYOUT = "openelm convert … --to hf makes a folder that can be pushed"


@dataclass(frozen=True)
class Publication:
    """What a push uploads.

    Attributes:
        source: the opened model.
        files: by name, where the bytes are, or the bytes.
        left_out: names in the folder that are no part of the model.
        vouched: the folder has a manifest, and every byte is what it says.
    """

    source: Source
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    vouched: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        return {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()
        }


@dataclass(frozen=True)
class Pushed:
    """Where a model is now: a page for people, the commit, and files of an earlier model that the commit removed."""

    url: str
    commit: str
    removed: tuple[str, ...]


def publication(folder: Path, card: Path | None = None) -> Publication:
    """Check a Hugging Face folder, and say what of it belongs on the hub.

    A folder with a manifest is compared with it byte by byte, and gives the files that it lists; of another one, the
    files that a model is made of.

    Args:
        card: a file to upload as README.md instead of the folder's own.

    Raises:
        CheckpointError: it is no Hugging Face folder, or is damaged, or holds symbolic links.
        ConfigError: there is no such card.
    """
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        what = f"not a Hugging Face folder: it needs config.json, and {WEIGHTS} or {INDEX}"
        raise CheckpointError(what, file=folder, fix=_FIX_LAYOUT)
    vouched = (folder / MANIFEST).exists()
    if vouched:
        _verify(folder)
    source = open_hf(folder)
    present = sorted(path.name for path in folder.iterdir())
    chosen = _listed(folder) if vouched else [name for name in present if _is_part(name) or _is_text(name)]
    files: dict[str, Path | bytes] = {name: folder / name for name in chosen}
    for name in chosen:
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise CheckpointError("a link, not a file", file=folder / name, fix=f"cp -rL {folder} COPY, and push that")
    if vouched:
        files[MANIFEST] = _manifest_without_card(folder)
    if card is not None:
        files[CARD] = _card(card)
    return Publication(source, files, tuple(name for name in present if name not in files), vouched)


def _verify(folder: Path) -> None:
    try:
        verify_folder(folder, names=("config.json", *weight_files(folder)))
    except CheckpointError as error:
        if error.file == folder / CARD:
            error.fix = f"an edited card is given with --card; openelm convert {folder} --to hf -o NEW writes a new one"
        raise


def _listed(folder: Path) -> list[str]:
    return sorted([*json.loads(read_file(folder / MANIFEST))["files"], MANIFEST])


def _is_part(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _PARTS)


def _is_text(name: str) -> bool:
    return name == CARD or name.startswith("LICENSE")


def _card(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError:
        raise ConfigError(f"there is no card {path}", fix="--card takes a Markdown file") from None


def _manifest_without_card(folder: Path) -> bytes:
    """List all files but the card, which people edit on the hub."""
    listed = json.loads(read_file(folder / MANIFEST))["files"]
    return manifest_bytes({name: entry for name, entry in listed.items() if name != CARD})


def check_name(repo: str) -> None:
    """Check a repository's name.

    Raises:
        ConfigError: it is not OWNER/NAME, or not one that the hub allows.
    """
    needed("huggingface_hub", extra="hf")
    from huggingface_hub.utils import validate_repo_id

    owner, slash, name = repo.partition("/")
    try:
        if not (owner and slash and name) or "/" in name:
            raise ValueError
        validate_repo_id(repo)
    except ValueError:
        raise ConfigError(
            f"{repo!r} is not the name of a repository",
            fix="give OWNER/NAME: letters, digits, '-', '_' and '.', at most 96; no '--' or '..', no '-' or '.' at an "
            "end, no '.git' behind",
            code="E_HUB",
        ) from None


def push(
    what: Publication, repo: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> Pushed:
    """Upload a publication as one commit, which appears whole or not at all; the repository is made if there is none.

    Files of a model that the repository held before and that are not among the new ones are removed by the same commit:
    a reader would take them for a part of the model. Everything else stays.

    Args:
        repo: OWNER/NAME.
        private: only its owner may see the repository.
        revision: a branch, made if there is none; the main one by default.
        message: of the commit.

    Raises:
        ConfigError: the name, the token, the rights or the card are wrong, or the repository exists and is public
            though it should be private.
        Stopped: the hub cannot be reached, or does not work; what had arrived is not sent again.
    """
    check_name(repo)
    hub = needed("huggingface_hub", extra="hf")
    token = hub.get_token()
    if token is None:
        fix = "set HF_TOKEN, or run `hf auth login`, with a token that may write"
        raise ConfigError("there is no token for the hub", fix=fix, code="E_HUB")
    api = hub.HfApi(token=token, library_name="openelm")
    with _explained(repo, token):
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo).private:
            fix = "make it private in its settings, choose another name, or leave out --private"
            raise ConfigError(f"{repo} exists and everybody can see it", fix=fix, code="E_HUB")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo, revision=revision)
        removed = tuple(name for name in sorted(there) if _is_part(name) and "/" not in name and name not in what.files)
        operations = [hub.CommitOperationDelete(name) for name in removed]
        operations += [hub.CommitOperationAdd(name, source) for name, source in what.files.items()]
        done = api.create_commit(
            repo,
            operations,
            commit_message=message or f"{what.source.config.parameters:,} parameters",
            revision=revision,
        )
    return Pushed(url if revision is None else f"{url}/tree/{revision}", done.oid, removed)


@contextlib.contextmanager
def _explained(repo: str, token: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into ours, without the token, whoever repeats it."""
    from httpx import HTTPError

    try:
        yield
    except OpenELMError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        below = _cause(error, HTTPError) if isinstance(error, RuntimeError) else error
        raise _explanation(repo, below, token) from None


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException:
    """Find the error of the connection below the ones that tell which file it was, or the first of all."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return next((link for link in chain if isinstance(link, kind)), chain[-1])


def _explanation(repo: str, error: BaseException, token: str) -> OpenELMError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    said = " ".join(said.replace(token, "…").split())[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return ConfigError("huggingface_hub is offline", fix="unset HF_HUB_OFFLINE", code="E_HUB")
    if status in (401, 403, 404):
        what = f"the hub does not let this token write to {repo} ({status}: {said})"
        return ConfigError(what, fix="check the name, and that the token has write access to it", code="E_HUB")
    if isinstance(status, int) and status < 500 and status not in (408, 429):
        return ConfigError(f"the hub refused {repo} ({status}: {said})", fix="see what it says", code="E_HUB")
    if status is None and isinstance(error, ValueError):
        return ConfigError(f"the hub refused {repo}: {said}", fix="see what it says", code="E_HUB")
    what = f"the upload failed ({said})" if status is None else f"the hub failed ({status}: {said})"
    return Stopped(what, fix="run the same command again; files that arrived are not sent again", code="E_NETWORK")
