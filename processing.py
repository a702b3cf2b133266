"""The analysis: a pure function from JSON to JSON, and the loader of the user's own.

`analyze` is what the service does until you say otherwise. To have it do something else, change it
here, or leave it and start the service with ANALYSIS=package.module:function. Such a function is
given the value under "data", already checked, and returns any JSON value; when it raises, the
receiver is told the type and the message. It may run in many threads at once.
"""

import itertools
import math
import operator
import statistics
import string
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs import errors

#: What describes a value: JSON, ready to be posted.
Profile = dict[str, Any]

#: What describes numbers, given in ascending order. One more line here is one more figure.
FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.mean,
    "stdev": statistics.stdev,  # of a sample: divided by n - 1
    "min": operator.itemgetter(0),
    "lower_quartile": lambda numbers: _quartile(numbers, 1),
    "median": statistics.median,
    "upper_quartile": lambda numbers: _quartile(numbers, 3),
    "max": operator.itemgetter(-1),
}

#: Fields described in one result, over all levels; the others are only counted.
MAX_FIELDS = 200

#: Levels of fields and items described in one result.
MAX_LEVELS = 8

#: Values, or words, in a list of the most frequent ones.
MAX_FREQUENT = 10

#: Characters shown of a value or a word.
MAX_SHOWN = 64

#: The names that JSON gives to Python's types.
TYPES: Mapping[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}

#: Taken off both ends of a word.
PUNCTUATION = string.punctuation + "“”„‘’‚«»‹›…–—¡¿。、，！？：；「」"  # noqa: RUF001 - as printed


def analyze(data: Any) -> Profile:
    """Return a profile of any JSON value: its type, and the figures that describe such a value.

    * A number, a boolean or null: its `value`.
    * A string: `characters`, `words`, `lines`, `most_frequent_words`.
    * An object: `fields`, one profile each, and how many `fields_left_out` once there are too many.
    * An array: the `count` of its values, their `types`, how many are `missing` (null), and then,
      for nothing but numbers, the figures of FIGURES; for records (objects), `fields` with one such
      profile each, where `missing` means absent or null; for arrays, one profile of all their
      `items` together; for anything else, the `most_frequent` strings, numbers and booleans.

    A figure is null where there is none (the standard deviation of one number), or where computing
    it leaves the range of a float. The result stays small, however large the data.
    """
    return _profile(data, itertools.repeat(None, MAX_FIELDS), MAX_LEVELS)


def _profile(value: Any, room: Iterator[None], levels: int) -> Profile:
    """Describe one value.

    Args:
        value: Any JSON value.
        room: Yields once for each field that may still be described, at this level or another.
        levels: How many levels may be described below this value.
    """
    match value:
        case str():
            facts = _text(value)
        case list():
            facts = _column(value, room, levels)
        case dict():
            facts = _fields(value, lambda inner: _profile(inner, room, levels - 1), room, levels)
        case _:
            facts = {"value": value}
    return {"type": TYPES[type(value)], **facts}


def _text(text: str) -> Profile:
    """Describe a text. Words stand between white space; upper and lower case are the same."""
    stripped = (word.strip(PUNCTUATION) for word in text.split())
    words = [word.casefold() for word in stripped if word]
    return {
        "characters": len(text),
        "words": len(words),
        "lines": len(text.splitlines()),
        "most_frequent_words": _most_frequent(words),
    }


def _column(values: list[Any], room: Iterator[None], levels: int, *, absent: int = 0) -> Profile:
    """Describe many values together: the items of an array, or one field of all records."""
    present = [value for value in values if value is not None]
    types = Counter(TYPES[type(value)] for value in present)
    return {
        "count": len(present),
        "types": dict(types),
        "missing": absent + len(values) - len(present),
        **_facts(present, set(types), room, levels),
    }


def _facts(values: list[Any], types: set[str], room: Iterator[None], levels: int) -> Profile:
    """Return what is worth knowing of values of these types, none of them null."""
    if types == {"number"}:
        return _numbers(values)
    if types == {"object"}:
        return _records(values, room, levels)
    if types == {"array"} and levels:
        items = list(itertools.chain.from_iterable(values))
        return {"items": _column(items, room, levels - 1)}
    scalars = (value for value in values if not isinstance(value, list | dict))
    return {"most_frequent": _most_frequent(scalars)}


def _records(records: list[dict[str, Any]], room: Iterator[None], levels: int) -> Profile:
    """Describe records field by field."""
    columns = defaultdict(list)
    for name, value in itertools.chain.from_iterable(record.items() for record in records):
        columns[name].append(value)

    def describe(values: list[Any]) -> Profile:
        return _column(values, room, levels - 1, absent=len(records) - len(values))

    return _fields(columns, describe, room, levels)


def _fields(
    fields: Mapping[str, Any],
    describe: Callable[[Any], Profile],
    room: Iterator[None],
    levels: int,
) -> Profile:
    """Describe as many fields as there is room for, this level's before those within them."""
    names = [name for name, _ in zip(fields, room, strict=False)] if levels else []
    return {
        "fields": {name: describe(fields[name]) for name in names},
        "fields_left_out": len(fields) - len(names),
    }


def _numbers(numbers: list[float]) -> Profile:
    """Return every figure of at least one number."""
    ordered = sorted(numbers)
    return {name: _finite(figure, ordered) for name, figure in FIGURES.items()}


def _finite(figure: Callable[[Sequence[float]], float], numbers: Sequence[float]) -> float | None:
    """Return one figure, or None where there is none that a float can hold."""
    try:
        value = figure(numbers)
        return value if math.isfinite(value) else None
    except (OverflowError, statistics.StatisticsError):
        return None


def _quartile(numbers: Sequence[float], which: int) -> float:
    """Return quartile 1, 2 or 3, the extremes included; of one number, that number."""
    if len(numbers) == 1:
        return numbers[0]
    return statistics.quantiles(numbers, n=4, method="inclusive")[which - 1]


def _most_frequent(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Count strings, numbers and booleans; of equally frequent ones, what came first is first."""
    # With its type, because to Python True and 1 are equal.
    counts = Counter((TYPES[type(value)], value) for value in values)
    return [
        {"value": _shortened(value), "count": count}
        for (_, value), count in counts.most_common(MAX_FREQUENT)
    ]


def _shortened(value: Any) -> Any:
    """Return a long string cut to MAX_SHOWN characters, the last of them "…"."""
    too_long = isinstance(value, str) and len(value) > MAX_SHOWN
    return f"{value[: MAX_SHOWN - 1]}…" if too_long else value


def load(path: str) -> Callable[..., Any]:
    """Return the function that ANALYSIS names, such as `shop.prices:run` or `shop:Prices.run`.

    From here on modules are also found in the current directory, after all other places: a file
    there hides nothing of the service, nor of what it is built on.

    Raises:
        ConfigError: One line that says why there is no such function.
    """
    module_name, _, attribute = path.partition(":")
    if not all(name.isidentifier() for name in f"{module_name}.{attribute}".split(".")):
        raise _refusal(path, "expected package.module:function")
    module = _import(path, module_name)
    try:
        function: object = operator.attrgetter(attribute)(module)
    except AttributeError:
        raise _refusal(path, f"the module {module_name!r} has no {attribute!r}") from None
    if callable(function):
        return function
    raise _refusal(path, f"{attribute!r} is no function but of type {type(function).__name__!r}")


def _import(path: str, module_name: str) -> ModuleType:
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.append(directory)
    try:
        return import_module(module_name)
    except (Exception, SystemExit) as exc:  # whatever the user's code raises, sys.exit() too
        # The name is that of the module or of a package it is in, not of something it imports.
        if isinstance(exc, ModuleNotFoundError) and f"{module_name}.".startswith(f"{exc.name}."):
            where = f"looked in {directory} and on the Python path"
            raise _refusal(path, f"there is no module {module_name!r} ({where})") from None
        raise _refusal(path, f"importing it raised {type(exc).__name__}: {exc}") from exc


def _refusal(path: str, problem: str) -> errors.ConfigError:
    return errors.ConfigError([" ".join(f"ANALYSIS={path!r}: {problem}".split())])
