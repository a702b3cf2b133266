"""The default analysis describes any JSON value."""

import json
import operator
import statistics
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import processing
from tests.harness import ROOT

IRIS = ROOT / "docs" / "examples" / "iris.json"

#: Every number that a payload can hold.
NUMBERS = st.integers(-(10**40) + 1, 10**40 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)

few_examples = settings(deadline=None, max_examples=40)


def nested(levels, *, wrap):
    """Return 1 within that many arrays or objects."""
    return wrap(nested(levels - 1, wrap=wrap)) if levels else 1


def close(number):
    return pytest.approx(number, rel=1e-9, abs=0)


def frequent(profile, key="most_frequent"):
    """Return the pairs of a list of the most frequent values."""
    return [(entry["value"], entry["count"]) for entry in profile[key]]


@pytest.mark.parametrize(
    ("value", "type_name"),
    [(0, "number"), (10**40, "number"), (-2.5, "number"), (False, "boolean"), (None, "null")],
)
def test_a_scalar_is_described_by_its_type_and_value(value, type_name):
    assert repr(processing.analyze(value)) == repr({"type": type_name, "value": value})


def test_a_text_is_counted_in_characters_words_and_lines():
    profile = processing.analyze("To be, or not\nto be?\n")

    words = frequent(profile, "most_frequent_words")
    assert words == [("to", 2), ("be", 2), ("or", 1), ("not", 1)]
    assert (profile["characters"], profile["words"], profile["lines"]) == (21, 6, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \t\n - -- … !?", []),
        ("Straße STRASSE", [("strasse", 2)]),
        ("«Don't» “don't,” (DON'T)", [("don't", 3)]),
        ("well-known हिन्दी हिन्दी", [("हिन्दी", 2), ("well-known", 1)]),
        ("w" * 100, [("w" * 63 + "…", 1)]),
    ],
)
def test_words_are_found_between_white_space_without_punctuation_and_case(text, words):
    profile = processing.analyze(text)

    assert frequent(profile, "most_frequent_words") == words


@few_examples
@given(st.lists(NUMBERS.filter(lambda number: abs(number) < 1e150), min_size=2, max_size=30))
@example([1e15 + 1, 1e15 + 2, 1e15 + 3])
@example([10**40 - 1, -(10**40) + 1, 0.5])
def test_the_figures_agree_with_exact_arithmetic_and_the_statistics_module(numbers):
    profile = processing.analyze(numbers)

    exact = [*map(Fraction, numbers)]
    lower, middle, upper = statistics.quantiles(numbers, n=4, method="inclusive")
    assert profile["mean"] == close(float(sum(exact) / len(exact)))
    assert profile["stdev"] == close(statistics.stdev(exact))
    assert (profile["min"], profile["max"]) == (min(numbers), max(numbers))
    assert profile["lower_quartile"] == close(lower)
    assert profile["median"] == close(middle)
    assert profile["upper_quartile"] == close(upper)


@pytest.mark.parametrize(
    ("numbers", "beyond"),
    [
        ([7], {"stdev"}),
        ([1e308, 1e308], {"lower_quartile", "median", "upper_quartile"}),
        ([10**400, 10**401], set(processing.FIGURES)),
    ],
)
def test_a_figure_that_is_no_float_is_null(numbers, beyond):
    profile = processing.analyze(numbers)

    assert {name for name in processing.FIGURES if profile[name] is None} == beyond


@pytest.mark.parametrize(
    ("values", "types", "most_frequent"),
    [
        ([None, None], {}, []),
        (["b", "a", None, "a", "B"], {"string": 4}, [("a", 2), ("b", 1), ("B", 1)]),
        ([1, True, 0, False], {"number": 2, "boolean": 2}, [(1, 1), (True, 1), (0, 1), (False, 1)]),
        ([1, 1.0, "1"], {"number": 2, "string": 1}, [(1, 2), ("1", 1)]),
        (["x", [1], {"a": 1}, "x"], {"string": 2, "array": 1, "object": 1}, [("x", 2)]),
        (["x" * 65], {"string": 1}, [("x" * 63 + "…", 1)]),
        ([*"abcdefghijkz", "z"], {"string": 13}, [("z", 2), *((one, 1) for one in "abcdefghi")]),
    ],
)
def test_mixed_values_are_told_apart_by_type(values, types, most_frequent):
    profile = processing.analyze(values)

    assert profile["types"] == types
    assert repr(frequent(profile)) == repr(most_frequent)
    assert profile["missing"] == values.count(None)


def test_arrays_in_an_array_are_described_by_all_their_items():
    profile = processing.analyze([[1, 2], [], [6, None]])

    assert profile["types"] == {"array": 3}
    assert (profile["items"]["mean"], profile["items"]["missing"]) == (3, 1)


def test_records_are_described_field_by_field():
    records = [{"price": 2, "at": {"x": 1}}, {"price": None, "at": {"y": 1}}, {"price": 4}]

    profile = processing.analyze(records)

    price, at = profile["fields"]["price"], profile["fields"]["at"]
    assert (profile["count"], profile["missing"], profile["fields_left_out"]) == (3, 0, 0)
    assert (price["count"], price["missing"], price["mean"]) == (2, 1, 3)
    assert (at["missing"], at["fields"]["y"]["missing"]) == (1, 1)


def test_each_field_of_an_object_is_described_by_itself():
    profile = processing.analyze({"": None, "__class__": {"list": [True]}})

    assert profile["fields"][""] == {"type": "null", "value": None}
    assert profile["fields"]["__class__"]["fields"]["list"]["types"] == {"boolean": 1}


@pytest.mark.parametrize(
    "wrap", [lambda fields: fields, lambda fields: [fields]], ids=["object", "records"]
)
def test_fields_beyond_the_limit_are_left_out_the_inner_ones_first(wrap):
    fields = {f"f{number}": {"inner": 1} for number in range(processing.MAX_FIELDS + 5)}

    profile = processing.analyze(wrap(fields))

    assert [*profile["fields"]] == [*fields][: processing.MAX_FIELDS]
    assert profile["fields_left_out"] == 5
    assert profile["fields"]["f0"]["fields_left_out"] == 1


@pytest.mark.parametrize(
    "wrap",
    [lambda value: [value], lambda value: {"a": value}, lambda value: [{"a": value}]],
    ids=["arrays", "objects", "records"],
)
def test_deep_data_has_a_shallow_profile(wrap):
    profile = json.dumps(processing.analyze(nested(450, wrap=wrap)))

    assert profile.count('"fields"') <= processing.MAX_LEVELS + 1
    assert profile.count('"items"') <= processing.MAX_LEVELS


def test_the_iris_flowers_have_the_figures_known_from_the_books():
    data = json.loads(IRIS.read_text(encoding="utf-8"))["data"]

    fields = processing.analyze(data)["fields"]

    figures = operator.itemgetter("min", "max", "mean", "stdev")
    assert figures(fields["sepal_length"]) == pytest.approx((4.3, 7.9, 5.84, 0.83), abs=0.005)
    assert frequent(fields["species"]) == [("setosa", 50), ("versicolor", 50), ("virginica", 50)]


@few_examples
@given(JSON_VALUES)
@example([1e308, -1e308, 1e308, 5e-324])
@example({"k" * 100_000: ["v" * 100_000]})
@example([{f"f{number}": number for number in range(1000)}])
def test_every_json_value_has_a_small_strict_json_profile_and_is_left_unchanged(data):
    before = json.dumps(data)

    profile = processing.analyze(data)

    text = json.dumps(profile, allow_nan=False)
    assert json.loads(text) == profile
    assert len(text) <= 5 * len(before) + 400 * processing.MAX_FIELDS
    assert json.dumps(data) == before
