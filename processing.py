"""The default analysis: a profile of any JSON value. Replace it with a function of your own.

Change `analyze` here, or start the service with ANALYSIS=package.module:function. Your function is
given the value under "data", already checked, and returns any JSON value. If it raises an
exception, the receiver gets a `job.failed` event with the error. It may run in several threads at
once.
"""

import math
import statistics
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

#: What describes a value: JSON, ready to be posted.
Profile = dict[str, Any]

#: What describes numbers, given in ascending order. One more line here is one more figure.
FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.mean,
    "stdev": statistics.stdev,  # of a sample: divided by n - 1
    "min": min,
    "lower_quartile": lambda numbers: _quartile(numbers, 1),
    "median": statistics.median,
    "upper_quartile": lambda numbers: _quartile(numbers, 3),
    "max": max,
}

#: Fields described in one result, over all levels. The others are only counted.
MAX_FIELDS = 200

#: Levels of fields and items described in one result.
MAX_LEVELS = 8

#: Entries in a list of the most frequent values or words, and characters shown of each.
MAX_FREQUENT, MAX_SHOWN = 10, 64

#: Taken off both ends of a word.
PUNCTUATION = string.punctuation + "“”„‘’‚«»‹›…–—¡¿。、，！？：；「」"  # noqa: RUF001 - as printed


def analyze(data: Any) -> Profile:
    """Return a profile of any JSON value: its type, and the figures that describe such a value.

    * A number, a boolean or null: its `value`.
    * A string: `characters`, `words`, `lines`, `most_frequent_words`.
    * An object: `fields`, one profile each, and how many `fields_left_out` when there are too many.
    * An array: the `count` of its values, their `types`, and how many are `missing` (null). An
      array of numbers also has the figures of FIGURES. Records (objects) have `fields` with one
      such profile each, where `missing` means absent or null. Arrays have one profile of all their
      `items` together. Anything else has the `most_frequent` strings, numbers and booleans.

    A figure is null where there is none (the standard deviation of one number), or where it is not
    a float. The result stays small, however large the data.
    """
    return _profile(data, repeat(None, MAX_FIELDS), MAX_LEVELS)


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
            facts = _fields(value, room, levels, lambda one: _profile(one, room, levels - 1))
        case _:
            facts = {"value": value}
    return {"type": _type(value), **facts}


def _type(value: Any) -> str:
    """Return the name that JSON gives to the type of a value."""
    names = {bool: "boolean", str: "string", list: "array", dict: "object", type(None): "null"}
    return names.get(type(value), "number")


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
    types = dict(Counter(map(_type, present)))
    facts = {"count": len(present), "types": types, "missing": absent + len(values) - len(present)}
    if [*types] == ["number"]:
        ordered = sorted(present)
        return facts | {name: _finite(figure, ordered) for name, figure in FIGURES.items()}
    if [*types] == ["object"]:
        return facts | _records(present, room, levels)
    if [*types] == ["array"] and levels:
        return facts | {"items": _column([*chain.from_iterable(present)], room, levels - 1)}
    scalars = (value for value in present if not isinstance(value, list | dict))
    return facts | {"most_frequent": _most_frequent(scalars)}


def _records(records: list[dict[str, Any]], room: Iterator[None], levels: int) -> Profile:
    """Describe records field by field."""
    columns = defaultdict(list)
    for name, value in chain.from_iterable(record.items() for record in records):
        columns[name].append(value)

    def describe(values: list[Any]) -> Profile:
        return _column(values, room, levels - 1, absent=len(records) - len(values))

    return _fields(columns, room, levels, describe)


def _fields(
    fields: Mapping[str, Any], room: Iterator[None], levels: int, describe: Callable[[Any], Profile]
) -> Profile:
    """Describe as many fields as there is room for, this level's before those within them."""
    names = [name for name, _ in zip(fields, room, strict=False)] if levels else []
    described = {name: describe(fields[name]) for name in names}
    return {"fields": described, "fields_left_out": len(fields) - len(names)}


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
    counts = Counter((_type(value), value) for value in values)  # to Python, True and 1 are equal
    return [
        {"value": _shortened(value), "count": count}
        for (_, value), count in counts.most_common(MAX_FREQUENT)
    ]


def _shortened(value: Any) -> Any:
    """Return a long string cut to MAX_SHOWN characters, the last of them "…"."""
    is_long = isinstance(value, str) and len(value) > MAX_SHOWN
    return f"{value[: MAX_SHOWN - 1]}…" if is_long else value
