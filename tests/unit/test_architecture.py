"""The layout of docs/design.md, held to be true by reading the source."""

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
import tokenize

import pytest

from tests.harness import ROOT

#: A module imports only modules of ours that stand before it.
ORDER = [
    *("processing", "jobs.errors", "jobs.model", "jobs.worker"),
    *("web.intake", "web.outbound", "web.signatures", "config", "postback"),
    *("jobs.storage", "jobs.journal", "jobs.executor", "jobs.dask_executor"),
    *("web.logs", "web.metrics", "jobs.writer", "jobs.runner"),
    *("web.server", "web.receiver", "web.demo", "app"),
]

#: Who may import what. Whoever else needs it asks the owner for a function.
OWNERS = {
    "bottle": {"app", "web.receiver", "web.server"},
    "distributed": {"jobs.dask_executor", "web.demo"},
    "prometheus_client": {"web.metrics"},
    "pycurl": {"web.outbound"},
    "requests": {"postback", "web.demo", "web.outbound"},
    "waitress": {"web.server"},
    "sqlite3": {"jobs.journal", "jobs.storage"},
    "subprocess": {"jobs.executor", "web.demo"},
}

#: The five files that the README names as an hour's reading.
CORE = ("app", "jobs.model", "jobs.journal", "jobs.runner", "postback")

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


def tracked(pattern: str) -> list[str]:
    """Return the files that git knows, so that a user's own files break nothing."""
    command = ["git", "ls-files", "--", pattern]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).exists()]


def is_product(path: str) -> bool:
    return path.partition("/")[0] in ("jobs", "web") or "/" not in path


PATHS = [path for path in tracked("*.py") if is_product(path)]
SOURCES = {
    path.removesuffix(".py").replace("/", "."): (ROOT / path).read_text(encoding="utf-8")
    for path in PATHS
    if not path.endswith("__init__.py")
}
TREES = {module: ast.parse(source) for module, source in SOURCES.items()}

pytestmark = pytest.mark.skipif(not PATHS, reason="the layout is read in a clone of git's")


def imported(module: str) -> set[str]:
    """Return the dotted names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(module)}


def own(module: str) -> set[str]:
    """Return the modules of ours that a module imports."""
    names = imported(module)
    return {one for one in SOURCES if any(f"{name}.".startswith(f"{one}.") for name in names)}


def lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def code_lines(source: str) -> int:
    """Return how many lines have code: no docstring, no comment, no blank line."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            texts |= set(lines_of(node.body[0]))
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*nothing, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - texts)


# What may import what


def test_every_module_has_its_place():
    assert set(SOURCES) == set(ORDER)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    assert own(module) - {module} <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("library", OWNERS)
def test_only_its_owners_import_a_library(library):
    assert {module for module in SOURCES if library in packages(module)} == OWNERS[library]


def test_every_library_has_an_owner():
    used = set().union(*map(packages, SOURCES)) - sys.stdlib_module_names
    ours = {module.partition(".")[0] for module in SOURCES}

    assert used - ours <= set(OWNERS)


@pytest.mark.parametrize("module", ["jobs.worker", "processing"])
def test_what_runs_beside_the_users_code_needs_nothing_else(module):
    optional = {"annotationlib"}  # of Python 3.14

    assert packages(module) <= sys.stdlib_module_names | optional


def test_nothing_happens_at_import():
    optional = {"distributed"}
    libraries = [name for name in OWNERS if name not in sys.stdlib_module_names | optional]
    command = [sys.executable, "-Bc", IMPORT_ALL, " ".join(libraries), " ".join(sorted(SOURCES))]

    child = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)

    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


# Names and places


def test_only_the_four_given_files_lie_at_the_top_level():
    top = {module for module in SOURCES if "." not in module}

    assert top == {"app", "config", "postback", "processing"}
    assert top.isdisjoint(sys.stdlib_module_names)
    assert top.isdisjoint(importlib.metadata.packages_distributions())


def test_sql_is_in_the_journal_alone():
    texts = {
        module: [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        for module, tree in TREES.items()
    }

    with_sql = {module for module, found in texts.items() if any(SQL.search(str(t)) for t in found)}

    assert with_sql == {"jobs.journal", "jobs.storage"}


# Size, in lines of code: what there is now, so that it does not grow unseen. The aims are 450 for a
# module, 2,900 for the product and 1,350 for the core.

MAX_MODULE, MAX_PRODUCT, MAX_CORE = 450, 4200, 1295


@pytest.mark.parametrize("module", SOURCES)
def test_functions_and_modules_are_short(module):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]

    assert [one.name for one in functions if length(one) > 40] == []
    assert code_lines(SOURCES[module]) <= MAX_MODULE


def length(function: ast.FunctionDef) -> int:
    """Return how many lines a function has, but for its docstring."""
    documented = ast.get_docstring(function) is not None
    return len(lines_of(function)) - documented * len(lines_of(function.body[0]))


def test_the_product_is_small():
    lines = {module: code_lines(source) for module, source in SOURCES.items()}

    assert sum(lines.values()) <= MAX_PRODUCT
    assert sum(lines[module] for module in CORE) <= MAX_CORE
