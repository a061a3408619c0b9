"""What several test files share."""

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType

if TYPE_CHECKING:
    from kvbench.models.base import LoadedModel

if not Path("/dev/nvidiactl").exists():  # Triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).resolve().parent / "golden"
LONGEST_FIRST = (
    "test_contract.py",
    "test_accuracy.py",
    "test_static_shapes.py",
    "test_efficiency.py",
    "test_lm_eval.py",
    "test_sharing_cache.py",
    "test_sharing.py",
    "test_train.py",
    "test_cli.py",
    "test_ruler.py",
    "test_composed.py",
    "test_architectures.py",
    "test_passes.py",
    "test_engine.py",
    "test_sweep.py",
    "test_notebook.py",
)
"""Files that take the longest. A file stays with one process, so a long one that starts last is waited for."""


_read_config = ConfigRepository.load_config
_packaged: dict[tuple[str, str], bytes] = {}


def _load_config(self: ConfigRepository, config_path: str) -> Any:
    """Read a configuration file of an installed package once in a process: half of a composition's time goes there."""
    source = self._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.scheme() != "pkg":
        return _read_config(self, config_path)
    key = source.path, config_path
    if key not in _packaged:
        _packaged[key] = pickle.dumps(_read_config(self, config_path))
    return pickle.loads(_packaged[key])


ConfigRepository.load_config = _load_config  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that is marked ``gpu`` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the public data sets that some tests read; they are not part of the repository."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("KVBENCH_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the data sets are not at {folder}; set KVBENCH_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Kept-index sets made by the published implementations (``tests/golden/README.md``)."""
    values: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The server of measuring processes, started for the memory passes too before a test starts it without them."""
    from processes import start_server

    start_server()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fork_server: None) -> None:
    """Memory is measured in forks, and no process waits for another: for tests of anything but the times."""
    from kvbench.runners import search
    from kvbench.runners.measure import passes
    from kvbench.runners.measure.fresh import in_forked_process

    for module in (passes, search):
        monkeypatch.setattr(module, "in_memory_process", lambda call, job, _: in_forked_process(call, job))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the lock for measuring lies


@pytest.fixture(scope="session")
def smollm2() -> "LoadedModel":
    """The default model in float32 on the CPU, from the user's cache; a test never downloads it."""
    import torch

    from kvbench.models.embedded import Embedded

    source = Embedded()
    if not source.is_cached():
        pytest.skip(f"the default model is not in {source.folder}; `make model` puts it there")
    return source.load("cpu", torch.float32)
