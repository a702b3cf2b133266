"""The parts of a worker that need no process: the loader, the job object, and strict JSON."""

import collections
import dataclasses
import datetime as dt
import decimal
import functools
import json
import os
import pathlib
import re
import sys
import types
from typing import Any

import pytest

from jobs import worker


@dataclasses.dataclass
class Point:
    x: int = 0


def nested(levels, wrap):
    """Return 1 within that many arrays or objects."""
    value = 1
    for _ in range(levels):
        value = wrap(value)
    return value


def imitation(name):
    """Return a value whose type has this name, as if that package were installed."""
    package, _, kind = name.rpartition(".")
    return type(kind, (), {"__module__": f"{package}.core.inner"})()


# JSON


@pytest.mark.parametrize(
    "value", [None, True, -2.5, "é\0", [], [[1, "a"], {"b": None}], {1: "a", 2: "b"}, (1, (2,))]
)
def test_what_json_has_an_equal_for_is_encoded(value):
    assert json.loads(worker.encode(value)) == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"rows": [0, {"price": float("nan")}]}, 'result["rows"][1]["price"] is nan, which is not'),
        ([decimal.Decimal(1)], "result[0] is a decimal.Decimal: use float(...), or str(...)"),
        ({1: "a", "1": "b"}, 'result has the keys 1 and "1", which are the same in JSON'),
        ([{(1, 2): 3}], "the key (1, 2) of result[0] is a tuple: use str(...)"),
        (["\ud800"], "result[0] has half of a surrogate pair"),
        pytest.param(10**5000, "result is not JSON: Exceeds the limit", id="digits"),
    ],
)
def test_what_is_not_json_is_named_by_its_path(value, fault):
    with pytest.raises(worker.NotJSONError) as caught:
        worker.encode(value)

    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("value", "use"),
    [
        ({1}, "sorted(...) or list(...)"),
        (range(3), "list(...)"),
        (1j, "[x.real, x.imag]"),
        (Point(), "dataclasses.asdict(...)"),
        (pathlib.Path(), "str(...), or its parts"),
        (collections.deque(), "list(...)"),
        (dt.datetime(2026, 1, 2, tzinfo=dt.UTC), ".isoformat()"),
        (imitation("numpy.bool"), "bool(...)"),
        (imitation("numpy.ndarray"), ".tolist()"),
        (imitation("pandas.ExtensionArray"), ".tolist()"),
        (imitation("pandas.Series"), ".to_dict()"),
        (imitation("pandas.DataFrame"), '.to_dict("records")'),
        (imitation("pandas.NAType"), "None"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__qualname__,
)
def test_what_is_not_json_comes_with_what_to_use(value, use):
    with pytest.raises(worker.NotJSONError) as caught:
        worker.encode([value])

    assert str(caught.value).startswith("result[0] is a ")
    assert str(caught.value).endswith(f": use {use}")


@pytest.mark.parametrize("levels", [129, 100_000])
def test_what_is_nested_too_deeply_is_refused_by_every_python(levels):
    value = nested(levels, lambda inner: [inner])

    with pytest.raises(worker.NotJSONError, match="nested deeper than 128 levels"):
        worker.encode(value)


def test_128_levels_are_not_too_deep():
    value = nested(128, lambda inner: {"a": inner})

    assert json.loads(worker.encode(value)) == value


# The job


@pytest.fixture
def told():
    return []


@pytest.fixture
def job(told):
    facts = {"id": "j1", "start": 2, "metadata": {"a": 1}, "kept": "[1]"}
    return worker.Job(lambda *report: told.append(report), **facts)


def test_reports_that_follow_too_soon_are_dropped_but_none_that_keeps(job, told):
    job.progress(0.1, "a" * 300 + "\ud800")
    job.progress(0.2)
    job.progress(0.3, keep={"step": 3})
    job.progress(1.0000000000000002, keep=None)

    assert told == [(0.1, "a" * 200, None), (0.3, "", '{"step": 3}'), (1.0, "", "null")]
    assert job.kept is None


@pytest.mark.parametrize(
    ("fraction", "keep", "message"),
    [
        ("0.5", 1, "fraction must be a number from 0 to 1, but it is '0.5'"),
        (None, 1, "but it is None"),
        pytest.param(10**400, 1, "but it is 1000", id="digits"),
        (float("nan"), 1, "fraction must be a number from 0 to 1, but it is nan"),
        (2, 1, "but it is 2"),
        (0.5, [{1}], "keep[0] is a set: use sorted(...) or list(...)"),
        (0.5, {1: 2}, "the key 1 of keep would come back as a string: use str(...)"),
        (0.5, [{"a": {None: 2}}], 'the key None of keep[0]["a"] would come back as a string'),
        (0.5, float("inf"), "keep is inf, which is not JSON: use None"),
        (0.5, "x" * 1024**2, "keep is 1048578 bytes of JSON; at most 1048576"),
    ],
)
def test_wrong_progress_is_an_error_that_says_what_is_right(job, fraction, keep, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        job.progress(fraction, keep=keep)


def test_after_the_end_progress_does_nothing_and_keeping_fails(job):
    def hung_up(*_):
        raise BrokenPipeError

    job._report = hung_up

    job.progress(0.5)
    with pytest.raises(RuntimeError, match="The job has ended, so nothing can be kept"):
        job.progress(0.5, keep=1)


def test_a_value_that_could_not_be_kept_is_not_the_kept_one(job):
    def refuse(*_):
        raise RuntimeError("the disk is full")

    job._report = refuse

    with pytest.raises(RuntimeError, match="the disk is full"):
        job.progress(0.5, keep=2)
    assert job.kept == [1]


def test_progress_in_a_fork_is_an_error(job, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)

    with pytest.raises(RuntimeError, match="only in the process that runs the analysis"):
        job.progress(0.5)


# The loader


class Called:
    def __call__(self, data):
        return data

    def method(self, data, job):
        return job


async def awaited(data, job):
    return job


async def async_generator(data):
    yield data


def generator(data):
    yield data


def annotated(data: "Unknown", job: "Unknown"):  # type: ignore[name-defined] # noqa: F821
    return job


called = Called()
generating = type("Generating", (), {"__call__": generator})()
shapes = types.SimpleNamespace(
    job_by_keyword=lambda data, *, job: job,
    optional_job=lambda data, job=None: job,
    optional_other=lambda data, other=None: other,
    rest=lambda *rest, **others: len(rest) + len(others),
    partly=functools.partial(lambda first, data, job: job, 1),
    nothing=lambda: None,
    two_by_keyword=lambda data, *, one, other: None,
    number=5,
)


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("called", "data"),
        ("called.method", "job"),
        ("awaited", "job"),
        ("annotated", "job"),
        ("shapes.job_by_keyword", "job"),
        ("shapes.optional_job", "job"),
        ("shapes.optional_other", None),
        ("shapes.rest", 1),
        ("shapes.partly", "job"),
    ],
)
def test_an_analysis_is_called_as_it_wants_to_be(name, result):
    job: Any = "job"

    assert worker.call(worker.load(f"{__name__}:{name}"), "data", job) == result


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shapes.nothing", "expected shapes.nothing(data) or shapes.nothing(data, job), but it is"),
        ("shapes.two_by_keyword", "but it is shapes.two_by_keyword(data, *, one, other)"),
        ("generator", "is a generator: expected a function that returns its result"),
        ("async_generator", "is a generator"),
        ("generating", "is a generator"),
        ("Called.method", "is a method of a class: expected one of an object"),
        ("shapes.number", "'shapes.number' is not a function but of type int"),
        ("nowhere", f"the module '{__name__}' ({__file__}) has no 'nowhere'"),
    ],
)
def test_other_shapes_are_refused(name, problem):
    with pytest.raises(worker.LoadError) as caught:
        worker.load(f"{__name__}:{name}")

    assert problem in str(caught.value)


def test_of_a_failure_the_places_in_the_users_code_are_told(job):
    def fail_twice(data, job):
        try:
            json.loads("{")
        except ValueError as exc:
            raise ExceptionGroup("several", [KeyError("a"), RuntimeError("b")]) from exc

    def fail_for_a_reason(data, job):
        try:
            exec(compile("json.loads('{')", "tests/compiled.pyx", "exec"))
        except ValueError as exc:
            raise OSError("no file") from exc

    kinds, facts = zip(
        *(worker.run(one, b'{"data": 1}', job) for one in (fail_twice, fail_for_a_reason)),
        strict=True,
    )
    group, cause = map(json.loads, facts)

    assert kinds == (worker.ERROR, worker.ERROR)
    assert (group["kind"], group["message"], cause["kind"]) == ("KeyError", "'a'", "OSError")
    for one, facts, lines in ((fail_twice, group, (4,)), (fail_for_a_reason, cause, (4, 2))):
        line = one.__code__.co_firstlineno
        assert facts["frames"] == [f"{__file__}:{line + n} {one.__name__}" for n in lines]


@pytest.mark.parametrize(
    "name",
    ["", "shop", "shop:", ":run", "shop.py:run()", "a:b:c", ".a:b", "a:b\n", "a/b.py:c", "no.py:a"],
)
def test_a_malformed_name_is_refused_with_the_right_form(name):
    form = r"expected package\.module:function, with dots in place of slashes and without \.py$"
    with pytest.raises(worker.LoadError, match=form):
        worker.load(name)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def run(:", "importing it raised SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "importing it raised SystemExit: 3"),
        ("import os\nos.stat('/no')", "No such file or directory: '/no' ({path}:2 <module>)"),
        ("import nowhere", "it imports 'nowhere', which is not installed: add a line `nowhere` to"),
        ("import nowhere", "if nowhere.py is your own file, put it beside app.py"),
        ("import sklearn.svm", "add a line `scikit-learn` to requirements-local.txt"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused(tmp_path, monkeypatch, source, problem):
    (tmp_path / "own_shop.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    sys.modules.pop("own_shop", None)

    with pytest.raises(worker.LoadError) as caught:
        worker.load("own_shop:run")

    assert problem.format(path=tmp_path / "own_shop.py") in str(caught.value)


class EmptyGroup(ExceptionGroup[Exception]):
    exceptions = ()


class Evil(str):
    def __getitem__(self, _):
        raise RuntimeError


class EvilError(Exception):
    def __str__(self):
        return Evil("m")


@pytest.mark.parametrize(
    ("exc", "kind", "message"),
    [
        (EmptyGroup("m", [ValueError()]), "Exception", "(its message cannot be read)"),
        (EvilError(), "EvilError", "(its message cannot be read)"),
        (type("N" * 3_000, (Exception,), {})("m"), "N" * worker.MAX_NOTE, "m"),
    ],
    ids=["group", "message", "name"],
)
def test_an_exception_that_cannot_be_described_is_an_error_all_the_same(job, exc, kind, message):
    def fail(data, job):
        raise exc

    frame, payload = worker.run(fail, b'{"data": 1}', job)

    facts = json.loads(payload)
    assert (frame, facts["kind"], facts["message"]) == (worker.ERROR, kind, message)
    assert facts["may_run_again"]


def test_a_note_that_reports_itself_does_not_stop_the_job(job, told):
    class Note:
        def __str__(self):
            job.progress(0.5, "inner")
            return "outer"

    job.progress(0.6, Note(), keep=1)

    assert told == [(0.5, "inner", None), (0.6, "outer", "1")]
