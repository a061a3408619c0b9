"""Import rules (docs/explanation/decisions.md), descriptions of YAMLs, docstrings, sizes of files and functions.

The rules are read off the syntax tree of every file, relative imports included, so that an import inside a function or
under ``TYPE_CHECKING`` counts too. Each rule is also shown to catch a file that breaks it.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMON = tuple(
    f"kvbench.conf.{name}" for name in ("chat", "errors", "identity", "options", "user_cache", "versions", "wording")
)


@dataclass(frozen=True)
class Rule:
    """Allowed imports of the files of one folder, beside the standard library.

    Attributes:
        own: Modules of this project, each with everything under it.
        others: Third-party packages; None allows all but ``never``.
        never: Prefixes of names that are refused (``transformers.AutoModel`` refuses ``AutoModelForCausalLM`` as well).
    """

    own: tuple[str, ...]
    others: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()


# A tokenizer may be looked at by a task; a model may not.
MODEL_CLASSES = (
    "transformers.models",
    "transformers.modeling_utils",
    "transformers.AutoModel",
    "transformers.cache_utils",
)

RULES = {
    "kvbench": Rule(own=("kvbench",), others=()),
    "conf": Rule(own=("kvbench.conf",), others=()),
    "methods": Rule(own=("kvbench.methods", *COMMON), others=("torch", "transformers", "numpy", "filelock")),
    "models": Rule(own=("kvbench.models", "kvbench.methods.sharing", "kvbench.methods.cache", *COMMON)),
    "tasks": Rule(own=("kvbench.tasks", *COMMON), never=("torch", *MODEL_CLASSES)),
    "runners": Rule(
        own=(
            "kvbench.runners",
            "kvbench.conf",
            "kvbench.methods",
            "kvbench.models",
            "kvbench.tasks",
            "kvbench.analysis",
        )
    ),
    "analysis": Rule(own=("kvbench.analysis", *COMMON), never=("torch", "transformers")),
}
NOT_PACKAGED = ("kvbench.run", "kvbench.scripts", "kvbench.tests", "kvbench.kvbench")
"""What can be imported in a checkout alone, because ``kvbench/__init__.py`` looks for packages next to its folder."""
OF_ONE_PLACE = {"triton": "methods/storage/kernels/", "optimum": "methods/storage/hf_quantized.py"}
"""What only one file or folder may import, and only where the package is there."""
CONFIG_FRAMEWORK = ("hydra", "omegaconf")
KNOWS_HYDRA = ("runners/cli.py", "runners/config/")


def imports(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything ``source`` imports, were it at ``file`` below the root.

    ``from a import b`` gives ``a.b``: whether b is a module or a name in one cannot be seen, and need not be.
    """
    package = ("kvbench", *Path(file).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield node.lineno, ".".join((*base, *([node.module] if node.module else []), alias.name))


def below(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def violations(source: str, file: str) -> list[str]:
    """One line for each import of ``source`` that a file at ``file`` may not have."""
    rule = RULES.get(Path(file).parts[0]) if len(Path(file).parts) > 1 else None
    found = []
    for line, name in imports(source, file):
        top = name.split(".")[0]
        reason: str | None
        if top in RULES and top != "kvbench":
            reason = f"the import name is kvbench.{top}"
        elif top == "run" or below(name, NOT_PACKAGED):
            reason = "is no part of what is installed"
        elif top in CONFIG_FRAMEWORK and not file.startswith(KNOWS_HYDRA) and not file.startswith("tests/"):
            reason = f"only {' and '.join(KNOWS_HYDRA)} import Hydra"
        elif rule is None or top in sys.stdlib_module_names:
            continue
        elif top == "kvbench":
            reason = None if below(name, rule.own) else f"{Path(file).parts[0]} may import {', '.join(rule.own)}"
        elif top in OF_ONE_PLACE:
            reason = None if file.startswith(OF_ONE_PLACE[top]) else f"only {OF_ONE_PLACE[top]} uses it"
        elif rule.others is not None and top not in rule.others:
            reason = (
                f"{Path(file).parts[0]} may import {', '.join(rule.others) or 'nothing'} beside the standard library"
            )
        else:
            reason = f"{Path(file).parts[0]} does not use it" if name.startswith(rule.never) else None
        if reason:
            found.append(f"{file}:{line}: {name}: {reason}")
    return found


def python_files() -> list[str]:
    folders = [*RULES, "scripts", "tests"]
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in [ROOT / "run.py", *files]]


@pytest.mark.parametrize("file", python_files())
def test_a_file_imports_only_what_its_folder_may(file: str) -> None:
    assert violations((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("methods/cache/method.py", "import pandas"),
        ("methods/cache/method.py", "from ...models.base import LoadedModel"),
        ("methods/policies/scorers/snapkv.py", "from ....tasks import base"),
        ("methods/policies/scorers/snapkv.py", "def f():\n    from ....runners.engine import prefill"),
        ("methods/policies/scorers/snapkv.py", "from ....conf import other"),
        ("models/base.py", "from ..methods.policies.base import Selection"),
        ("models/base.py", "import kvbench.runners.engine"),
        ("tasks/longbench.py", "import torch"),
        ("methods/cache/method.py", "import triton"),
        ("tasks/longbench.py", "import torch.nn.functional as F"),
        ("tasks/longbench.py", "from transformers import AutoModelForCausalLM"),
        ("tasks/longbench.py", "from transformers.models.llama import LlamaForCausalLM"),
        ("tasks/longbench.py", "from ..methods import Method"),
        ("analysis/tables/text.py", "from ...runners.records.record import RunFolder"),
        ("analysis/tables/text.py", "from kvbench.methods.cache.method import Method"),
        ("runners/engine/prefilling.py", "import hydra.utils"),
        ("runners/efficiency.py", "from omegaconf import OmegaConf"),
        ("analysis/load.py", "import torch"),
        ("analysis/load.py", "from transformers import AutoTokenizer"),
        ("analysis/load.py", "if TYPE_CHECKING:\n    from ..runners.records.record import Record"),
        ("analysis/load.py", "from ..tasks.base import Task"),
        ("conf/errors.py", "from ..tasks.base import Task"),
        ("conf/errors.py", "import numpy"),
        ("tests/test_x.py", "import methods"),
        ("scripts/x.py", "from models.base import ModelSource"),
        ("scripts/x.py", "import hydra"),
        ("runners/cli.py", "import run"),
        ("tests/test_x.py", "from run import main"),
        ("runners/cli.py", "from .. import run"),
        ("tests/test_x.py", "from kvbench.tests.tiny_models import tiny_model"),
        ("runners/api.py", "from .. import SnapKV"),
        ("kvbench/__init__.py", "import torch"),
    ],
)
def test_each_rule_can_fail(file: str, source: str) -> None:
    assert len(violations(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "methods/policies/scorers/snapkv.py",
            "import math\nimport torch\nfrom ....conf.errors import require\nfrom .base import X",
        ),
        (
            "methods/cache/method.py",
            "from ..policies.base import Selection\nfrom .prefill import Prompt\nfrom . import attention",
        ),
        ("models/sharing.py", "from ..methods.sharing.cla import CLA\nimport huggingface_hub"),
        (
            "tasks/longbench.py",
            "from transformers import PreTrainedTokenizerBase\nimport jieba\nfrom ..conf import errors",
        ),
        ("runners/accuracy.py", "from ..analysis.stats import Estimate\nfrom ..analysis import stats\nimport tqdm"),
        ("runners/cli.py", "import hydra\nfrom omegaconf import OmegaConf"),
        ("runners/config/methods.py", "import hydra\nfrom ...conf.errors import InputError"),
        ("analysis/plots.py", "import matplotlib.pyplot as plt\nfrom .load import runs"),
        ("run.py", "from kvbench.runners.cli import main"),
        ("kvbench/__init__.py", "import importlib\nfrom kvbench.methods.cache.method import Method"),
        ("scripts/x.py", "import kvbench\nfrom kvbench import SnapKV"),
    ],
)
def test_what_the_rules_allow(file: str, source: str) -> None:
    assert violations(source, file) == []


def test_the_package_folder_holds_the_public_api_alone() -> None:
    files = {path.name for path in (ROOT / "kvbench").iterdir() if path.name != "__pycache__"}
    assert files == {"__init__.py", "py.typed"}


def test_every_folder_of_python_files_is_a_package_of_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for top in RULES for path in (ROOT / top).rglob("__init__.py")}
    names = {folder.as_posix().replace("/", ".") for folder in folders}
    assert set(project["packages"]) == {name if name == "kvbench" else f"kvbench.{name}" for name in names}
    assert project["package-dir"] == {name if name == "kvbench" else f"kvbench.{name}": name for name in RULES}


def modules(folder: str) -> list[str]:
    files = [p for p in sorted((ROOT / folder).rglob("*.py")) if "notebooks" not in p.parts]
    names = ["kvbench." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names]


IMPORT_WITHOUT = """
import importlib, sys

class Missing:
    def find_spec(name, path=None, target=None):
        if name in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing)
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def import_without(missing: str, names: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", IMPORT_WITHOUT, missing, *names], capture_output=True, text=True)


@pytest.mark.parametrize(("folder", "missing"), [("analysis", "torch,transformers"), ("tasks", "torch")])
def test_a_machine_without_torch_will_do(folder: str, missing: str) -> None:
    """Tables and plots are made on laptops; the tree above shows direct imports only, this shows all of them."""
    result = import_without(missing, modules(folder))
    assert result.returncode == 0, result.stderr


def test_the_commands_of_a_laptop_need_no_torch() -> None:
    """``kvbench table``, ``plot`` and ``kv-size`` go through the dispatcher."""
    result = import_without("torch,transformers,hydra", ["kvbench.runners.command", "kvbench.runners.records.record"])
    assert result.returncode == 0, result.stderr


def test_a_module_that_needs_torch_would_be_noticed() -> None:
    assert "torch" in import_without("torch", ["kvbench.models.base"]).stderr


def description(text: str) -> str:
    """The first line of a YAML file without its ``#``, Hydra's package aside; empty when it is not a comment."""
    first = text.removeprefix("# @package _global_\n").split("\n", 1)[0]
    return first.removeprefix("# ").strip() if first.startswith("# ") else ""


@pytest.mark.parametrize("file", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")))
def test_every_yaml_starts_with_what_it_is(file: str) -> None:
    """``--help`` lists these lines."""
    assert description((ROOT / file).read_text(encoding="utf-8")), f"{file}: the first line must be '# what this is'"


def test_a_yaml_without_a_description_would_be_noticed() -> None:
    assert description("# What it is\nname: x\n") == description("# @package _global_\n# What it is\n") == "What it is"
    assert not any(map(description, ("name: x\n", "\n# late\n", "#\nname: x\n", "")))


SOURCE = re.compile(r" # .+ \((paper|authors|library|ours): (.+)\)$")
NUMBERED = r"\b(section|table|algorithm|appendix|figure|equation|listing)s?\b,? ([A-Z]\b|[A-Z]?[0-9]|table [0-9])"
PLACE = re.compile(
    rf"{NUMBERED}|\babstract\b|[\w.-]+/[\w.-]+@[0-9a-f]{{7}} [\w./-]+|\b(kvpress|transformers) [0-9.]+ [\w./]+\.py"
    "|^unverified; "
)
"""Where a setting stands: a numbered part of a paper, a file of a repository at a commit, or a file of a release; or
the plain words that the place is not known."""


def says_where(line: str) -> bool:
    """Whether a line ends with a source in which a reader can look: our own choices give a reason instead."""
    source = SOURCE.search(line)
    return bool(source) and (source[1] == "ours" or bool(PLACE.search(source[2])))


def without_source(text: str) -> list[str]:
    """Lines of a YAML file of a method or of its parts that set a default and do not say whose it is and where.

    What refers to another key has its source there, and a budget of null is none. The parts that a ``defaults`` list
    chooses are defaults, too.
    """
    found = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        is_part = line.lstrip().startswith("- ")
        key, _, value = line.strip().removeprefix("- ").partition(":")
        is_default = is_part or (value.strip() and key not in ("_target_", "name"))
        is_elsewhere = key == "_self_" or value.strip().startswith(("${", "null # accepted"))
        if is_default and not is_elsewhere and not says_where(line):
            found.append(line.strip())
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf/method").rglob("*.yaml")), ids=lambda path: path.relative_to(ROOT / "conf").as_posix()
)
def test_every_default_of_a_method_says_whose_it_is_and_where(path: Path) -> None:
    """A reader must not take our choice for the paper's, and must be able to look the paper's up.

    The forms: ``(paper: section 3.2)``, ``(authors: OWNER/NAME@COMMIT FILE)``, ``(library: kvpress 0.5.5 FILE)``,
    ``(paper: unverified; where it is from)`` and ``(ours: why)``.
    """
    assert without_source(path.read_text(encoding="utf-8")) == []


def test_a_default_without_a_source_would_be_noticed() -> None:
    text = "name: x\nbudget: 64 # tokens\npolicy:\n  _target_: a.B\n  budget: ${..budget}\n  sinks: 4 # first tokens"
    assert without_source(text) == ["budget: 64 # tokens", "sinks: 4 # first tokens"]
    assert without_source(text.replace("tokens", "tokens (paper: section 3)")) == []
    assert without_source("_target_: a.B\nbits: 4 # of a code\nrecent: 0\n") == ["bits: 4 # of a code", "recent: 0"]


def test_a_part_without_a_source_would_be_noticed() -> None:
    text = "defaults:\n  - scorer: snapkv\n  - override storage: kivi4\n  - snapkv\n  - _self_\n"
    assert without_source(text) == ["- scorer: snapkv", "- override storage: kivi4", "- snapkv"]
    assert without_source("defaults:\n  - scorer: h2o # sums (paper: algorithm 1)\n  - _self_\n") == []


@pytest.mark.parametrize(
    ("source", "is_place"),
    [
        ("(paper: section 3.2)", True),
        ("(paper: appendix A)", True),
        ("(authors: owner/name@0123abc eval/run.py)", True),
        ("(library: kvpress 0.5.5 presses/cur_press.py)", True),
        ("(paper: unverified; kvpress 0.5.5 has it so)", True),
        ("(ours: any number)", True),
        ("(paper: 128)", False),
        ("(paper: LongBench runs; 16 for needles)", False),
        ("(paper: its appendix)", False),
        ("(authors: their code's default)", False),
        ("(authors: owner/name eval/run.py)", False),
        ("(authors: owner/name@0123abc)", False),
        ("(library: kvpress's default)", False),
        ("(library: kvpress 0.5.5)", False),
    ],
)
def test_a_source_names_a_place(source: str, is_place: bool) -> None:
    assert says_where(f"window: 8 # last queries {source}") is is_place


# docstrings -------------------------------------------------------------------------------------------------------


def base_names(node: ast.ClassDef) -> list[str]:
    """Names of a class's bases, without the modules in front of them and without type parameters."""
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in bases]


def is_inherited(name: str, node: ast.ClassDef, classes: dict[str, list[ast.ClassDef]]) -> bool:
    """Whether a base of a class documents the method; classes of one name are not told apart."""
    for base in (c for key in base_names(node) for c in classes.get(key, []) if c is not node):
        methods = [n for n in base.body if isinstance(n, ast.FunctionDef) and n.name == name]
        if any(map(ast.get_docstring, methods)) or is_inherited(name, base, classes):
            return True
    return False


def undocumented(tree: ast.Module, classes: dict[str, list[ast.ClassDef]]) -> list[str]:
    """Public classes, functions and methods without a docstring, except overrides of documented methods."""
    names, todo = [], [(None, node) for node in tree.body]
    while todo:
        owner, node = todo.pop()
        is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if not is_definition or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            todo += [(node, inner) for inner in node.body]
        if not ast.get_docstring(node) and (owner is None or not is_inherited(node.name, owner, classes)):
            names.append(node.name if owner is None else f"{owner.name}.{node.name}")
    return names


def classes_of(trees: list[ast.Module]) -> dict[str, list[ast.ClassDef]]:
    """Class definitions of modules, by name."""
    classes: dict[str, list[ast.ClassDef]] = {}
    for node in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        classes.setdefault(node.name, []).append(node)
    return classes


def test_public_classes_functions_and_methods_have_docstrings() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in project_modules().items()}
    transformers = importlib.util.find_spec("transformers")
    assert transformers is not None and transformers.origin is not None
    caches = Path(transformers.origin).parent / "cache_utils.py"  # the only outside bases with overridden methods
    classes = classes_of([*trees.values(), ast.parse(caches.read_text(encoding="utf-8"))])
    assert {name: found for name, tree in trees.items() if (found := undocumented(tree, classes))} == {}


def test_a_missing_docstring_is_found_unless_a_base_documents_the_method() -> None:
    source = '''
class A:
    """Documented."""
    def f(self): "Documented."
    def g(self): pass
    def _h(self): pass

class B(A):
    def f(self): pass
    def g(self): pass

def k(): pass
'''
    tree = ast.parse(source)
    assert sorted(undocumented(tree, classes_of([tree]))) == ["A.g", "B", "B.g", "k"]


# size and circles -------------------------------------------------------------------------------------------------

LONGEST_FILE, LONGEST_FUNCTION = 300, 60
SMALL_FOLDERS = ("conf", "methods", "models", "runners")


def runtime_imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the project that importing a file imports; what only a type checker imports is left out."""
    found, package = set(), path.relative_to(ROOT).with_suffix("").parts[:-1]
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            nodes += node.body
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [".".join([*filter(None, base), alias.name]) for alias in node.names]
            found |= {name if name in modules else name.rpartition(".")[0] for name in names}
    return found & modules.keys()


def project_modules() -> dict[str, Path]:
    paths = [p for top in RULES if top != "kvbench" for p in (ROOT / top).rglob("*.py") if "notebooks" not in p.parts]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def closure(name: str, graph: dict[str, set[str]]) -> set[str]:
    """A module and everything that it imports, directly or not."""
    found, todo = {name}, [name]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_no_module_imports_itself_through_others() -> None:
    modules = project_modules()
    graph = {name: runtime_imports(path, modules) for name, path in modules.items()}
    circles = [name for name in graph if any(name in closure(other, graph) for other in graph[name])]
    assert circles == []


def test_a_scorer_is_read_without_the_rest_of_the_project() -> None:
    """Lines of all files that a scorer imports, but for the types of its options: what a reader may have to open."""
    modules = project_modules()
    graph = {name: runtime_imports(path, modules) for name, path in modules.items()} | {"conf.options": set()}
    for name in modules:
        if name.startswith("methods.policies.scorers."):
            names = closure(name, graph) - {"conf.options"}
            lines = sum(len(modules[m].read_text(encoding="utf-8").splitlines()) for m in names)
            assert lines < 730, (name, lines)


def names_in(tree: ast.AST) -> set[str]:
    """Every identifier of a module: names, attributes, keywords, arguments and what is imported."""
    fields = ("id", "attr", "arg", "name", "asname")
    found = {getattr(node, field, None) for node in ast.walk(tree) for field in fields}
    return {part for name in found if isinstance(name, str) for part in name.split(".")}


def test_policies_and_storages_do_not_see_which_layers_share_keys_and_values() -> None:
    """The cache layer does: a policy attends when it is called, and evicts when it is called."""
    plan = ast.parse((ROOT / "methods/sharing/plan.py").read_text(encoding="utf-8"))
    (access,) = (n for n in plan.body if isinstance(n, ast.ClassDef) and n.name == "KVAccess")
    fields = {n.target.id for n in access.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert {"is_owner", "strictly_causal", "is_last_reader"} <= fields
    assert names_in(ast.parse("from a import b as c\nd.e(f=g)")) >= set("bcdefg")
    for path in [p for top in ("policies", "storage") for p in (ROOT / "methods" / top).rglob("*.py")]:
        assert not names_in(ast.parse(path.read_text(encoding="utf-8"))) & {"KVAccess", *fields}, path


@pytest.mark.parametrize("path", [p for top in SMALL_FOLDERS for p in sorted((ROOT / top).rglob("*.py"))], ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= LONGEST_FUNCTION] == []
