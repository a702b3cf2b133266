"""Runs the analysis: the one file of ours beside the user's code. Standard library only.

The service starts it as a process of its own (see jobs/executor.py) and sends it one connection
for each job. Each job gets a thread. A connection carries frames: a kind of one byte, a length of
four bytes, and as many bytes.

    the service                              the worker
    two lengths, its facts, its body   ──>
                                       <──   START: the thread runs, and blame begins
                                       <──   PROGRESS, also with a value to keep
    KEPT: nothing, or why it was not   ──>
                                       <──   RESULT or ERROR

It also holds what every way to run an analysis shares: the loader, the `job` object, and the JSON
encoder that names the place of what is not JSON.

    python -P jobs/worker.py <descriptor> <log level> <ANALYSIS>
    python -P jobs/worker.py analyze <file>
"""

import contextvars
import fcntl
import importlib
import inspect
import io
import json
import logging
import math
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from _thread import start_new_thread
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from functools import reduce
from pathlib import Path
from typing import Any

#: The first byte from a job's thread, before it reads the payload.
START = b"s"

#: Kinds of frames.
PROGRESS, KEPT, RESULT, ERROR = b"p", b"k", b"r", b"e"

#: What a worker says when it can serve. Any other line says why it cannot.
READY = b"\n"

#: The kind and the length of a frame; the lengths of a job's facts and of its body.
FRAME, LENGTHS = struct.Struct("!cI"), struct.Struct("!II")

#: Progress less than this many seconds after the last is dropped.
PROGRESS_SECONDS = 0.25

#: Characters of a note, characters of an error's message, innermost frames of a traceback.
MAX_NOTE, MAX_MESSAGE, MAX_FRAMES = 200, 2000, 30

#: Bytes of JSON that one job may keep, and that it may return.
MAX_KEPT_BYTES, MAX_RESULT_BYTES = 1024**2, 64 * 1024**2

#: Levels of arrays and objects in a result.
MAX_DEPTH = 128

#: How many points a worker is above the service when the kernel chooses what to kill for memory.
OOM_POINTS = 500

#: How much a worker gives way to the service, which has to answer while analyses compute.
NICE = 2

#: What to write in place of a type, or of one that is based on it. The first that fits counts.
HINTS: Mapping[str, str] = {
    "bool(...)": "numpy.bool numpy.bool_",
    "float(...)": "numpy.longdouble",
    ".item()": "numpy.generic",
    ".tolist()": "numpy.ndarray pandas.Index pandas.ExtensionArray array.array",
    ".to_dict()": "pandas.Series",
    '.to_dict("records")': "pandas.DataFrame",
    '.model_dump(mode="json")': "pydantic.BaseModel",
    ".value": "enum.Enum",
    "[x.real, x.imag]": "complex numpy.complexfloating",
    "None": "pandas.NaTType pandas.NAType",
    ".isoformat()": "datetime.date datetime.time",
    "float(...), or str(...) for all digits": "decimal.Decimal",
    ".decode(), or base64": "bytes bytearray",
    "sorted(...) or list(...)": "set frozenset",
    "list(...)": "generator range map filter zip dict_keys dict_values collections.deque",
    "dict(...)": "mappingproxy collections.UserDict collections.ChainMap",
    "str(...), or its parts": "object",
}

#: How ANALYSIS is written.
FORM = "expected package.module:function, with dots in place of slashes and without .py"

#: Packages whose name is not that of the module that they bring.
PACKAGES = {"PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn", "yaml": "PyYAML"}

#: The job for which this thread works. asyncio hands it on to tasks and to `to_thread`.
job_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("job_id", default=None)

# Taken before the analysis can replace them, as gevent does.
_Lock, _Socket = threading.Lock, socket.socket

_working = set[socket.socket]()  # a connection for each job that runs here

_OURS = (__file__, importlib.__file__, "<frozen ")
_LIBRARY = re.compile(f"{re.escape(str(Path(os.__file__).parent))}/|.*-packages/")
_NOTHING: Any = object()  # None is a value that can be kept
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_SCALARS = frozenset({str, int, float, bool, type(None)})
_SURROGATE = re.compile("[\ud800-\udfff]")
_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode

#: Is given a fraction, a note, and the JSON text that is to be kept, if any. Raises OSError when
#: the service has hung up, and RuntimeError when the text could not be kept.
Report = Callable[[float, str, str | None], None]


class LoadError(Exception):
    """The analysis cannot be used. The message says why in one line."""


class NotJSONError(ValueError):
    """A value is not JSON. The message names the place and what to use there."""


class Job:
    """What an analysis is given as its second parameter: the job that it runs for.

    Attributes:
        id: The job's id.
        start: 1 when the analysis of this job is run for the first time.
        metadata: The object that the caller sent beside the data; None when there is none.
    """

    def __init__(self, report: Report, **facts: Any) -> None:
        self.id: str = facts["id"]
        self.start: int = facts["start"]
        self.metadata: dict[str, Any] | None = facts["metadata"]
        self._kept: str | None = facts["kept"]
        self._report = report
        self._pid = os.getpid()
        self._next_at = -math.inf  # monotonic
        self.lock = _Lock()  # held while something is sent

    @property
    def kept(self) -> Any:
        """What was kept last, by this run or an earlier one; None when nothing was."""
        return None if self._kept is None else json.loads(self._kept)

    def progress(self, fraction: float, note: str = "", *, keep: Any = _NOTHING) -> None:
        """Tell how far the analysis is, and perhaps keep a value from which it can go on.

        Reports are limited to one every 0.25 s. Extra reports are dropped, but never one that
        keeps a value: it is on disk when this returns. Once the job has ended, reports do nothing.

        Args:
            fraction: From 0 to 1.
            note: Cut to 200 characters.
            keep: A JSON value of at most 1 MiB. It replaces what was kept before.

        Raises:
            ValueError: `fraction` is not a number from 0 to 1, or `keep` is not JSON or too large.
            RuntimeError: The value could not be kept.
        """
        kept = None if keep is _NOTHING else _checked_kept(keep)
        is_fit = False
        with suppress(TypeError):  # it is not a number
            is_fit = 0 <= fraction < 1.000001  # a sum of tenths may be a little more than 1
        if not is_fit:
            raise ValueError(f"fraction must be a number from 0 to 1, but it is {fraction!r}")
        fraction, note = min(round(float(fraction), 6), 1.0), _clean(str(note), MAX_NOTE)
        if os.getpid() != self._pid:
            raise RuntimeError("job.progress works only in the process that runs the analysis")
        with self.lock:
            if kept is None and time.monotonic() < self._next_at:
                return
            self._next_at = time.monotonic() + PROGRESS_SECONDS
            try:
                self._report(fraction, note, kept)
            except (OSError, ValueError):  # the service has hung up
                if kept is not None:
                    raise RuntimeError("The job has ended, so nothing can be kept.") from None
            if kept is not None:
                self._kept = kept


def _checked_kept(value: Any) -> str:
    text = encode(value, "keep")
    if len(text) > MAX_KEPT_BYTES:
        raise ValueError(f"keep is {len(text)} bytes of JSON; at most {MAX_KEPT_BYTES} are kept")
    return text.decode()


def _clean(text: str, limit: int) -> str:
    return text[:limit].encode(errors="replace").decode()  # half of a surrogate pair is not UTF-8


# The result as JSON


def encode(value: Any, root: str = "result") -> bytes:
    """Return a value as JSON in UTF-8.

    Raises:
        NotJSONError: Such as `result["rows"][3]["price"] is a numpy.bool: use bool(...)`.
    """
    try:
        text = _encode(value).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise NotJSONError(next(_faults(root, value), f"{root} is not JSON: {exc}")) from None
    # The encoder writes keys 1 and "1" alike, and how deep it goes depends on Python's version.
    if not is_sound(value, MAX_DEPTH) and (fault := next(_faults(root, value), None)):
        raise NotJSONError(fault)
    return text


def is_sound(value: Any, max_depth: int) -> bool:
    """Return whether depth and keys are certainly right. A scalar is 0 deep, `[]` is 1.

    It is quick: it goes level by level, and passes over scalars.
    """
    level, depth = [value], 0
    while level and depth < max_depth:
        level = [one for one in level if isinstance(one, dict | list | tuple)]
        if any(type(key) is not str for one in level if isinstance(one, dict) for key in one):
            return False
        parts = [one.values() if isinstance(one, dict) else one for one in level]
        level = [child for part in parts for child in part if type(child) not in _SCALARS]
        depth += 1
    return not level


def _faults(path: str, value: Any, levels: int = MAX_DEPTH) -> Iterator[str]:
    """Name each thing in a value that is not JSON, and what to do."""
    if levels < 0:
        root = path.partition("[")[0]
        yield f"{root} contains itself or is nested deeper than {MAX_DEPTH} levels"
    elif isinstance(value, dict):
        yield from _faults_of_keys(path, value)
        for key, child in value.items():
            yield from _faults(f"{path}[{_shown(key)}]", child, levels - 1)
    elif isinstance(value, list | tuple):
        for place, child in enumerate(value):
            yield from _faults(f"{path}[{place}]", child, levels - 1)
    else:
        yield from _faults_of_scalar(path, value)


def _faults_of_keys(path: str, value: Mapping[Any, Any]) -> Iterator[str]:
    names: dict[str, Any] = {}
    for key in value:
        yield from _faults_of_scalar(f"the key {_shown(key)} of {path}", key)
        if not isinstance(key, str) and path.startswith("keep"):
            yield f"the key {_shown(key)} of {path} would come back as a string: use str(...)"
        first = names.setdefault(key if isinstance(key, str) else json.dumps(key), key)
        if first is not key:
            both = f"{_shown(first)} and {_shown(key)}"
            yield f"{path} has the keys {both}, which are the same in JSON"


def _faults_of_scalar(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}, which is not JSON: use None"
    elif isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
        yield f"{path} has half of a surrogate pair, for which there is no UTF-8: leave it out"
    elif value is not None and not isinstance(value, str | int | float):
        # Such as `numpy.bool`, wherever in its package the type is defined.
        kinds = [f"{k.__module__.partition('.')[0]}.{k.__name__}" for k in type(value).__mro__]
        kinds = [kind.removeprefix("builtins.") for kind in kinds]
        uses = (use for kind in kinds for use, those in HINTS.items() if kind in those.split())
        is_record = hasattr(value, "__dataclass_fields__")
        use = "dataclasses.asdict(...)" if is_record else next(uses)
        yield f"{path} is a {kinds[0]}: use {use}"


def _shown(key: Any) -> str:
    text = json.dumps(key, ensure_ascii=False) if isinstance(key, str) else repr(key)
    return text[:60]


# The user's function


def load(name: str) -> Callable[[Any, Job], Any]:
    """Return the function that ANALYSIS names, such as `shop.prices:run`, as one of data and job.

    Raises:
        LoadError: There is no such function, or it takes other parameters.
    """
    module_name, _, attribute = name.partition(":")
    parts = f"{module_name}.{attribute}".split(".")
    if module_name.endswith(".py") or not all(part.isidentifier() for part in parts):
        raise LoadError(FORM)
    module = _import(module_name)
    try:
        function = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        where = getattr(module, "__file__", None) or "no file"
        raise LoadError(f"the module {module_name!r} ({where}) has no {attribute!r}") from None
    if not callable(function):
        raise LoadError(f"{attribute!r} is not a function but of type {type(function).__name__}")
    return _with_job(function, attribute)


def _import(module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except BaseException as exc:  # whatever the user's code raises, sys.exit() too
        missing = exc.name if isinstance(exc, ModuleNotFoundError) and exc.name else ""
        if missing and f"{module_name}.".startswith(f"{missing}."):
            where = f"looked in {Path.cwd()} and in PYTHONPATH"
            raise LoadError(f"there is no module {module_name!r} ({where})") from None
        if not missing or "." in missing:
            where = "".join(f" ({place})" for place in _places(exc)[-1:])
            raise LoadError(f"importing it raised {type(exc).__name__}: {exc}{where}") from exc
        name = PACKAGES.get(missing, missing)
        line = f"add a line `{name}` to requirements-local.txt, or the package that brings it"
        own = f"if {missing}.py is your own file, put it beside app.py"
        text = f"it imports {missing!r}, which is not installed: {line}; {own}"
        raise LoadError(text) from None


def _places(exc: BaseException) -> list[str]:
    """Return where something was raised, and then where its cause was, the innermost place last.

    Places in this file are left out, and places in libraries unless there is no other.
    """
    places, causes = list[str](), [exc]
    for cause in causes:
        for frame, number in traceback.walk_tb(cause.__traceback__):
            if not (code := frame.f_code).co_filename.startswith(_OURS):
                places.append(_clean(f"{code.co_filename}:{number} {code.co_name}", 500))
        inner = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        if isinstance(cause, BaseExceptionGroup):
            inner = cause.exceptions[0]
        if inner is not None and len(causes) < MAX_FRAMES:  # there may be a circle
            causes.append(inner)
    # Compiled libraries name their files relative to their own folder.
    own = [one for one in places if one.startswith("/") and not _LIBRARY.match(one)]
    return own or places[-1:]


def _with_job(function: Callable[..., Any], name: str) -> Callable[[Any, Job], Any]:
    """Return a function of data and job, which hands on the job to a `function` that takes it."""
    kinds = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(is_kind(one) for is_kind in kinds for one in (function, type(function).__call__)):
        raise LoadError(f"{name!r} is a generator: expected a function that returns its result")
    # Annotations may name what is imported for type checkers only: 4 is Format.STRING.
    options: dict[str, Any] = {"annotation_format": 4} if sys.version_info >= (3, 14) else {}
    try:
        signature = inspect.signature(function, **options)
    except (TypeError, ValueError):  # some builtins have none
        return lambda data, _: function(data)
    if [*signature.parameters][:1] == ["self"]:
        raise LoadError(f"{name!r} is a method of a class: expected one of an object")
    others = [*signature.parameters.values()][1:]
    needed = [one.name for one in others if one.default is one.empty and one.kind not in _VARIABLE]
    takers = (needed or [one.name for one in others if one.name == "job"])[:1]
    try:
        signature.bind(None, **dict.fromkeys(takers))
    except TypeError:
        expected = f"expected {name}(data) or {name}(data, job)"
        raise LoadError(f"{expected}, but it is {name}{signature}") from None
    return lambda data, job: function(data, **dict.fromkeys(takers, job))


def call(analyze: Callable[[Any, Job], Any], data: Any, job: Job) -> Any:
    """Return what the analysis returns. A coroutine is awaited."""
    value = analyze(data, job)
    # It is imported only when needed, because it takes 30 ms.
    return importlib.import_module("asyncio").run(value) if inspect.iscoroutine(value) else value


def run(analyze: Callable[[Any, Job], Any], body: bytes, job: Job) -> tuple[bytes, bytes]:
    """Return the kind and the payload of the frame that tells how the analysis ended."""
    pid = os.getpid()
    try:
        try:
            value = call(analyze, json.loads(body.decode())["data"], job)
        finally:
            if os.getpid() != pid:  # a fork of the analysis came back
                os._exit(70)
        result = encode(value)
    except NotJSONError as exc:
        return ERROR, _error(exc, "not_serialisable")
    except BaseException as exc:  # noqa: BLE001 - whatever the user's code raises is an outcome
        return ERROR, _error(exc)
    if len(result) > MAX_RESULT_BYTES:
        text = f"The result is {len(result)} bytes of JSON; at most {MAX_RESULT_BYTES} are kept."
        return ERROR, _error(ValueError(text), "result_too_large")
    return RESULT, result


def _error(exc: BaseException, kind: str | None = None) -> bytes:
    """Return the payload of an ERROR frame. Only what the analysis raised may run again."""
    facts: dict[str, Any] = {"kind": kind or "Exception", "may_run_again": kind is None}
    facts |= {"message": "(its message cannot be read)", "frames": []}
    with suppress(BaseException):  # an exception of the user's may not even print
        facts["frames"] = _places(exc)[-MAX_FRAMES:]
        while isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        facts["kind"] = kind or _clean(type(exc).__name__, MAX_NOTE)
        facts["message"] = _clean(str(exc), MAX_MESSAGE)
    return json.dumps(facts).encode()


def analyze_on_dask(
    name: str, topic: str, facts: Mapping[str, Any], body: bytes
) -> tuple[bytes, bytes]:  # pragma: no cover - runs on the Dask workers
    """Do what `run` does on a Dask worker, whose reports are events of a topic."""
    tell = importlib.import_module("distributed").get_worker().log_event

    def report(fraction: float | None, note: str, kept: str | None) -> None:
        if kept is not None:
            remedy = "leave out keep, or use EXECUTOR=process"
            raise RuntimeError(f"EXECUTOR=dask cannot keep values: {remedy}")
        tell(topic, (facts["id"], fraction, note))

    report(None, "", None)  # it starts
    # It is loaded inside of `run`, which tells why it cannot be.
    return run(lambda *both: load(name)(*both), body, Job(report, **facts))  # noqa: PLW0108


# The connection of a job


def _read(stream: io.BufferedIOBase, size: int) -> bytes:
    """Return as many bytes. Raises OSError when the other end has hung up."""
    data = stream.read(size)
    if len(data) < size:
        raise ConnectionError
    return data


def send(connection: socket.socket, kind: bytes, payload: bytes) -> None:
    """Send a frame."""
    connection.sendall(FRAME.pack(kind, len(payload)) + payload)


def pack(facts: Mapping[str, Any], body: bytes) -> bytes:
    """Return what the service sends for a job."""
    header = json.dumps(facts).encode()
    return LENGTHS.pack(len(header), len(body)) + header + body


def _work(connection: socket.socket, analyze: Callable[[Any, Job], Any]) -> None:
    """Run one job, in a thread of its own."""
    # Before 3.13, what `current_thread()` returns here would be left for the next such thread.
    threading._active.pop(threading.get_ident(), None)  # type: ignore[attr-defined] # noqa: SLF001
    stream = connection.makefile("rb")

    def report(fraction: float, note: str, kept: str | None) -> None:
        send(connection, PROGRESS, _encode([fraction, note, kept]).encode())
        if kept is not None:
            _, length = FRAME.unpack(_read(stream, FRAME.size))
            if problem := _read(stream, length):
                raise RuntimeError(problem.decode())

    with suppress(OSError), connection, stream:  # the service has hung up
        connection.sendall(START)
        header_size, body_size = LENGTHS.unpack(_read(stream, LENGTHS.size))
        job = Job(report, **json.loads(_read(stream, header_size)))
        job_id.set(job.id)
        kind, payload = run(analyze, _read(stream, body_size), job)
        with job.lock:  # a report that is under way is waited for
            _working.discard(connection)
            send(connection, kind, payload)


def _serve(control: socket.socket, analyze: Callable[[Any, Job], Any]) -> None:
    """Start a thread for each connection that the service sends, until the service is gone."""
    flags, folder = getattr(socket, "MSG_CMSG_CLOEXEC", 0), Path.cwd()
    while True:
        sent, descriptors, _, _ = socket.recv_fds(control, 1, 1, flags)
        if not sent:
            return
        for number in descriptors:  # none when there are too many open files
            if number <= 2:  # the analysis has closed it, and what it prints must not go here
                low, number = number, fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)  # noqa: PLW2901
                os.close(low)
            connection = _Socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, number)
            connection.settimeout(None)  # the analysis may have set a default
            if not _working:  # a job before may have changed it
                with suppress(OSError):
                    os.chdir(folder)
            _working.add(connection)
            try:  # a threading.Thread costs 0.1 ms more, because it waits until the thread runs
                start_new_thread(_work, (connection, analyze))
            except RuntimeError:  # there are too many threads: the service loads another worker
                connection.close()


# The process


class _Stream(io.FileIO):
    """Descriptor 1 or 2. A stream that nobody reads any more must not fail a job."""

    def write(self, data: Any) -> int:
        """Write what can be written."""
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def _leave_nothing_inherited() -> None:
    """Set up signals and standard streams as a process of the user's own would have them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)
    with open(os.devnull, "rb") as null:  # noqa: PTH123 - plainer than a Path
        os.dup2(null.fileno(), 0)
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = io.BufferedWriter(_Stream(number, "wb", closefd=False))
        stream = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
        setattr(sys, name, stream)


def _end_with_service(lifeline: int) -> None:
    """Have the kernel kill this process group when the service ends, even by kill -9.

    Nothing is ever written to the lifeline, so its only event is its end. The kernel needs no
    thread of ours for this, so it also ends an analysis that never lets go of the interpreter.
    """
    with suppress(OSError, ValueError):  # and before that, when memory runs out (Linux)
        points = Path("/proc/self/oom_score_adj")
        points.write_text(str(min(int(points.read_text()) + OOM_POINTS, 1000)))
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere `_serve` returns
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
        if select.select([lifeline], [], [], 0)[0]:  # it has ended before
            os._exit(0)


def _add_job_ids() -> None:
    """Give every log record the job's id, unless whoever logs gives one."""
    # Not by a record factory: `extra={"job_id": ...}` would then raise KeyError in the user's code.
    make = logging.Logger.makeRecord

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.__dict__.setdefault("job_id", job_id.get())
        return record

    logging.Logger.makeRecord = make_record  # type: ignore[method-assign]


def _prepare(name: str, log_level: str) -> Callable[[Any, Job], Any]:
    """Set up the process that is there for an analysis, and load it.

    Modules are looked for here and then beside ours, after all other places. Logs are as those of
    the service, unless the user's module has set up logging.
    """
    del sys.argv[1:]
    for directory in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if str(directory) not in sys.path:
            sys.path.append(str(directory))
    _add_job_ids()
    analyze = load(name)
    form = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s job_id=%(job_id)s"
    formatter = logging.Formatter(form, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    return analyze


def _main(descriptor: str, log_level: str, name: str) -> None:
    control = socket.socket(fileno=int(descriptor))
    control.set_inheritable(False)
    os.register_at_fork(after_in_child=control.close)  # or a child would hide the end of this one
    _end_with_service(os.dup(0))
    os.nice(NICE)
    _leave_nothing_inherited()
    pid = os.getpid()
    try:
        analyze = _prepare(name, log_level)
        if os.getpid() != pid:  # a fork of the module came back
            os._exit(70)
    except LoadError as exc:
        control.sendall(" ".join(str(exc).split()).encode(errors="replace") + b"\n")
        sys.exit(78)
    try:
        with suppress(OSError):  # the service has ended meanwhile
            control.sendall(READY)
        _serve(control, analyze)
    finally:
        os.killpg(0, signal.SIGKILL)


# ./run analyze


def _analyze(path: str) -> None:
    """Run the configured analysis once on the payload in a file, and print the result."""
    name, payload = os.environ.get("ANALYSIS") or "processing:analyze", _payload(path)
    facts = {"id": "analyze", "start": 1, "metadata": payload.get("metadata"), "kept": None}
    try:
        with redirect_stdout(sys.stderr):  # the result alone is printed to the standard output
            analyze = _prepare(name, "info")
            value = call(analyze, payload["data"], Job(_draw, **facts))
    except LoadError as exc:
        sys.exit(f"ANALYSIS={name!r}: {exc}")
    except SystemExit as exc:
        sys.exit(f"The analysis called sys.exit({exc.code!r}), with which a job fails.")
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # below the bar
    try:
        print(json.dumps(json.loads(encode(value)), indent=2, ensure_ascii=False))
    except NotJSONError as exc:
        sys.exit(str(exc))


def _payload(path: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_bytes()
        payload = json.loads(text, parse_constant=_refuse_constant)
    except OSError as exc:
        sys.exit(f"{path}: {exc.strerror}")
    except (ValueError, RecursionError) as exc:
        sys.exit(f"{'Standard input' if path == '-' else path} is not JSON: {exc}")
    # The service checks more, but these mistakes are common.
    if not isinstance(payload, dict) or payload.get("data") in (None, "", [], {}):
        sys.exit('The payload needs "data" that is not null, "", [] or {}: write {"data": ...}.')
    return payload


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} must be null or a string")


def _draw(fraction: float, note: str, _kept: str | None) -> None:
    if sys.stderr.isatty():
        shown = note if note.isprintable() else repr(note)
        bar = f"\r[{'#' * int(fraction * 30):30}] {fraction:4.0%} {shown}\033[K"
        print(bar, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "analyze":
        _analyze(sys.argv[2])
    else:
        _main(*sys.argv[1:])
