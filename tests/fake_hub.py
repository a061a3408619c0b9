"""The four functions of huggingface_hub that are used, played at the edge to cache and network."""

from __future__ import annotations

from pathlib import Path

import pytest


class FakeHub:
    """A hub of one file.

    Attributes:
        file: what a download or the cache gives; its place in the hub is ``filename`` at ``revision``.
        reachable: repositories that answer.
        cached: repositories whose file is in the cache.
        broken: repositories that answer and do not give the file.
        offline: HF_HUB_OFFLINE is set.
        calls: (``probe``, address) and (``download``, repository), in order.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        file: Path | None,
        filename: str,
        revision: str,
        reachable: tuple[str, ...] = (),
    ):
        self.file, self.filename, self.revision, self.reachable = file, filename, revision, reachable
        self.cached: tuple[str, ...] = ()
        self.broken: tuple[str, ...] = ()
        self.offline = False
        self.calls: list[tuple[str, str]] = []
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", self.cache)
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", self.probe)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)
        monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: self.offline)

    def cache(self, repo: str, filename: str, repo_type: str, revision: str) -> str | None:
        assert (filename, repo_type, revision) == (self.filename, "dataset", self.revision)
        return str(self.file) if repo in self.cached else None

    def probe(self, url: str, timeout: float) -> None:
        assert url.endswith(f"/resolve/{self.revision}/{self.filename}")
        assert timeout < 10
        self.calls.append(("probe", url))
        if not any(f"/datasets/{repo}/" in url for repo in self.reachable):
            raise ConnectionError("Name or service not known\nsecond line")

    def download(self, repo: str, filename: str, repo_type: str, revision: str, etag_timeout: float) -> str:
        assert (filename, repo_type, revision) == (self.filename, "dataset", self.revision)
        assert repo in self.reachable
        self.calls.append(("download", repo))
        if repo in self.broken:
            raise OSError(28, "No space left on device")
        return str(self.file)
