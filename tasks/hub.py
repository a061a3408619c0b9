"""A data set's file on the Hugging Face hub, at a pinned revision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..conf.errors import InputError

PROBE_TIMEOUT_S = 4.0
"""Longest wait for the hub's first answer, for each name of a repository. (Its own download retries for a minute.)"""


class HubError(Exception):
    """There is no file; ``str`` says what was tried and why it failed, in one line."""


class HubUnavailable(HubError):
    """Neither the cache nor the network has the file."""


class DownloadFailed(HubError):
    """The hub answers, but the download breaks: a full disk, a lost connection."""


def fetch(repos: Sequence[str], filename: str, revision: str) -> tuple[Path, str]:
    """A file of a data set, and the repository it is from: the local cache's, else downloaded into it.

    Args:
        repos: names that the data set's repository has had, the most likely first.
        filename: in the repository.
        revision: commit.

    Raises:
        HubUnavailable: known after :data:`PROBE_TIMEOUT_S` for each of the names at the latest.
        DownloadFailed: the hub answers to a name, but no name gives the file.
    """
    import huggingface_hub as hub

    wanted: dict[str, Any] = {"filename": filename, "repo_type": "dataset", "revision": revision}
    for repo in repos:
        cached = hub.try_to_load_from_cache(repo, **wanted)
        if isinstance(cached, str):
            return Path(cached), repo
    if hub.is_offline_mode():
        raise HubUnavailable(f"{' and '.join(repos)} not in the cache and HF_HUB_OFFLINE is set")
    tried, failed = [], False
    for repo in repos:
        try:
            # One request that does not retry tells whether there is a hub to download from.
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, **wanted), timeout=PROBE_TIMEOUT_S)
        except Exception as error:  # the HTTP library's own errors, which huggingface_hub changes between versions
            tried.append(f"{repo} ({_in_short(error)})")
            continue
        try:
            return Path(hub.hf_hub_download(repo, **wanted, etag_timeout=PROBE_TIMEOUT_S)), repo
        except Exception as error:
            tried.append(f"{repo}/{filename} ({_in_short(error)})")
            failed = True
    raise (DownloadFailed if failed else HubUnavailable)(" and ".join(tried))


def fetch_or_refuse(
    repos: Sequence[str], filename: str, revision: str, *, what: str, key: str, instead: str
) -> tuple[Path, str]:
    """:func:`fetch`, with an InputError for ``key=None`` that names ``what`` could not be had, and what to do."""
    try:
        return fetch(repos, filename, revision)
    except HubError as error:
        raise InputError(key, None, f"{what} cannot be fetched from the hub: {error}; {instead}") from error


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no detail')}"
