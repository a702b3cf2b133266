"""The layout of docs/design.md and the README, held to be true by reading the source."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

#: Which files may import what. Whoever else needs it asks the owner for a function.
OWNERS = {
    "bottle": {"app.py", "web/browser.py", "web/receiver.py", "web/server.py"},
    "environs": {"config.py"},
    "prometheus_client": {"web/metrics.py"},
    "requests": {"postback.py", "web/transport.py"},
    "standardwebhooks": {"web/signatures.py"},
    "waitress": {"web/server.py"},
    "fcntl": {"jobs/storage.py"},
    "distributed": {"jobs/dask_executor.py"},
    "signal": {"app.py", "jobs/executors.py", "jobs/worker.py", "web/demo.py", "web/receiver.py"},
    "socket": {"web/outbound.py", "web/server.py", "web/transport.py"},
    "sqlite3": {"jobs/journal.py", "jobs/storage.py"},
    "subprocess": {"jobs/executors.py", "web/demo.py"},
}

TOP = ("app", "config", "postback", "processing")
PACKAGES = ("jobs", "web")
PATHS = sorted(
    str(path.relative_to(ROOT))
    for folder in (ROOT, *(ROOT / name for name in PACKAGES))
    for path in folder.glob("*.py")
)
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in PATHS}

#: A statement, not a word of prose.
SQL = re.compile(
    r"\b(SELECT\s.+\sFROM|INSERT INTO|UPDATE \w+ SET|DELETE FROM|CREATE TABLE|PRAGMA \w)", re.DOTALL
)

IMPORT_ALL = """
import importlib, logging, signal, sys
libraries, modules = sys.argv[1].split(), sys.argv[2].split()
for name in libraries:  # what these do is theirs
    importlib.import_module(name)
handlers = [signal.getsignal(number) for number in signal.valid_signals()]
watched = ("socket.", "sqlite3.", "subprocess.", "_thread.start", "os.putenv", "os.mkdir")
seen = []
def hook(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        seen.append(f"{event} {arguments[0]}")
    elif event.startswith(watched):
        seen.append(f"{event} {arguments}")
sys.addaudithook(hook)
for name in modules:
    importlib.import_module(name)
assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
assert not logging.root.handlers
print("; ".join(seen), end="")
"""


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


MODULES = {module_of(path) for path in PATHS if not path.endswith("__init__.py")}


def imported(path: str) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def own(path: str) -> set[str]:
    """Return the modules of ours that a file imports."""
    names = imported(path)
    return {one for one in MODULES if any(f"{name}.".startswith(f"{one}.") for name in names)}


def texts(path: str) -> list[str]:
    return [
        node.value
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("library", OWNERS)
def test_only_its_owners_import_a_library(library):
    assert {path for path in PATHS if library in packages(path)} == OWNERS[library]


def test_every_library_has_an_owner():
    used = set().union(*map(packages, PATHS)) - sys.stdlib_module_names - {*TOP, *PACKAGES}

    assert used <= set(OWNERS)


@pytest.mark.parametrize("path", [path for path in PATHS if "/" in path])
def test_no_package_imports_a_module_of_the_top_level(path):
    assert packages(path).isdisjoint(TOP)


@pytest.mark.parametrize("path", [path for path in PATHS if path.startswith("jobs/")])
def test_jobs_know_nothing_of_the_web(path):
    assert "web" not in packages(path)


def test_no_imports_go_round_in_a_circle():
    graph = {module_of(path): own(path) for path in PATHS}

    assert set(graphlib.TopologicalSorter(graph).static_order()) >= MODULES


@pytest.mark.parametrize("path", PATHS)
def test_no_import_is_for_type_checkers_only(path):
    names = {node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}

    assert "TYPE_CHECKING" not in names | attributes


def test_nothing_happens_at_import():
    optional = {"distributed"}
    libraries = [name for name in OWNERS if name not in sys.stdlib_module_names | optional]
    command = [sys.executable, "-Bc", IMPORT_ALL, " ".join(libraries), " ".join(sorted(MODULES))]

    child = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)

    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


@pytest.mark.parametrize("name", [*TOP, *PACKAGES])
def test_no_top_level_name_hides_another(name):
    assert name not in sys.stdlib_module_names
    assert name not in importlib.metadata.packages_distributions()


def test_only_the_four_given_files_lie_at_the_top_level():
    assert {module_of(path) for path in PATHS if "/" not in path} == set(TOP)


def test_no_module_is_a_drawer_for_everything():
    assert {"utils.py", "helpers.py", "common.py"}.isdisjoint(Path(path).name for path in PATHS)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_themselves_are_empty(name):
    assert TREES[f"{name}/__init__.py"].body == []


def test_sql_is_in_the_journal_alone():
    with_sql = {path for path in PATHS if any(map(SQL.search, texts(path)))}

    assert with_sql == {"jobs/journal.py", "jobs/storage.py"}


@pytest.mark.parametrize("path", PATHS)
def test_functions_are_short(path):
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef)
    }

    assert [name for name, lines in lengths.items() if lines > 45] == []
