import json
import operator
import statistics
import string
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import processing
from jobs import errors

IRIS = Path(__file__).parents[1] / "docs" / "examples" / "iris.json"

#: Every number that a payload can hold.
NUMBERS = st.integers(-(10**40) + 1, 10**40 - 1) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)

few_examples = settings(deadline=None, max_examples=60)


def nested(levels, *, wrap):
    """Return 1 within that many arrays or objects."""
    return wrap(nested(levels - 1, wrap=wrap)) if levels else 1


def close(number):
    return pytest.approx(number, rel=1e-9, abs=0)


def size(value):
    return len(json.dumps(value, allow_nan=False))


def frequent(profile, key="most_frequent"):
    """Return the pairs of a list of the most frequent values."""
    return [(entry["value"], entry["count"]) for entry in profile[key]]


# One value


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        (5, "number"),
        (0, "number"),
        (-2.5, "number"),
        (10**40, "number"),
        (1e308, "number"),
        (True, "boolean"),
        (False, "boolean"),
        (None, "null"),
    ],
)
def test_a_scalar_is_described_by_its_type_and_value(value, type_name):
    assert repr(processing.analyze(value)) == repr({"type": type_name, "value": value})


def test_a_text_is_counted_in_characters_words_and_lines():
    profile = processing.analyze("To be, or not to be:\nthat is the question.\n")

    assert profile == {
        "type": "string",
        "characters": 43,
        "words": 10,
        "lines": 2,
        "most_frequent_words": [
            {"value": "to", "count": 2},
            {"value": "be", "count": 2},
            {"value": "or", "count": 1},
            {"value": "not", "count": 1},
            {"value": "that", "count": 1},
            {"value": "is", "count": 1},
            {"value": "the", "count": 1},
            {"value": "question", "count": 1},
        ],
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n ", []),
        ("- -- … !?", []),
        ("Straße STRASSE", [("strasse", 2)]),
        ("«Don't» “don't,” (DON'T)", [("don't", 3)]),
        ("well-known", [("well-known", 1)]),
        ("cafe\u0301 CAFE\u0301", [("cafe\u0301", 2)]),
        ("हिन्दी हिन्दी", [("हिन्दी", 2)]),
        ("b a c a b", [("b", 2), ("a", 2), ("c", 1)]),
    ],
)
def test_words_are_found_between_white_space_without_punctuation_and_case(text, words):
    profile = processing.analyze(text)

    assert frequent(profile, "most_frequent_words") == words
    assert profile["words"] == sum(count for _, count in words)


@few_examples
@given(st.lists(st.sampled_from([*string.ascii_lowercase]), max_size=80))
def test_the_ten_most_frequent_words_are_listed_and_the_first_wins_a_tie(words):
    profile = processing.analyze(" ".join(words))

    first = {word: -position for position, word in reversed([*enumerate(words)])}
    by_rank = sorted(Counter(words).items(), key=lambda pair: (-pair[1], -first[pair[0]]))
    assert frequent(profile, "most_frequent_words") == by_rank[:10]


# Numbers


def test_numbers_have_every_figure():
    profile = processing.analyze([4, 1, 3, 2])

    assert profile == {
        "type": "array",
        "count": 4,
        "types": {"number": 4},
        "missing": 0,
        "mean": 2.5,
        "stdev": pytest.approx(1.2909944487358056),
        "min": 1,
        "lower_quartile": 1.75,
        "median": 2.5,
        "upper_quartile": 3.25,
        "max": 4,
    }


@few_examples
@given(st.lists(NUMBERS.filter(lambda number: abs(number) < 1e150), min_size=2, max_size=30))
@example([1e15 + 1, 1e15 + 2, 1e15 + 3])
@example([0.1] * 10)
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


def test_one_number_is_its_own_quartiles_and_has_no_standard_deviation():
    profile = processing.analyze([7])

    assert profile["stdev"] is None
    assert {profile[name] for name in processing.FIGURES.keys() - {"stdev"}} == {7}


@pytest.mark.parametrize(
    ("numbers", "beyond"),
    [
        ([1e308, 1e308], {"lower_quartile", "median", "upper_quartile"}),
        ([1.7e308, -1.7e308], {"stdev", "lower_quartile", "upper_quartile"}),
        ([10**400, 10**401], set(processing.FIGURES)),
    ],
)
def test_a_figure_beyond_the_range_of_a_float_is_null(numbers, beyond):
    profile = processing.analyze(numbers)

    assert {name for name in processing.FIGURES if profile[name] is None} == beyond


def test_the_mean_of_huge_integers_is_exact():
    assert processing.analyze([10**39, 10**39 + 2])["mean"] == 10**39 + 1


def test_nulls_among_numbers_are_missing():
    profile = processing.analyze([1, None, 3, None])

    assert (profile["count"], profile["missing"], profile["mean"]) == (2, 2, 2)
    assert profile["types"] == {"number": 2}


# Other arrays


def test_strings_are_counted_and_equally_frequent_ones_keep_their_order():
    profile = processing.analyze(["b", "a", None, "c", "a", "c", "B"])

    assert profile == {
        "type": "array",
        "count": 6,
        "types": {"string": 6},
        "missing": 1,
        "most_frequent": [
            {"value": "a", "count": 2},
            {"value": "c", "count": 2},
            {"value": "b", "count": 1},
            {"value": "B", "count": 1},
        ],
    }


@pytest.mark.parametrize(
    ("values", "types", "most_frequent"),
    [
        ([], {}, []),
        ([None, None], {}, []),
        ([True, False, True], {"boolean": 3}, [(True, 2), (False, 1)]),
        ([1, True, 0, False], {"number": 2, "boolean": 2}, [(1, 1), (True, 1), (0, 1), (False, 1)]),
        ([1, 1.0, "1"], {"number": 2, "string": 1}, [(1, 2), ("1", 1)]),
        (["x", [1], {"a": 1}, "x"], {"string": 2, "array": 1, "object": 1}, [("x", 2)]),
    ],
)
def test_mixed_values_are_told_apart_by_type(values, types, most_frequent):
    profile = processing.analyze(values)

    assert profile["types"] == types
    assert repr(frequent(profile)) == repr(most_frequent)
    assert profile["missing"] == values.count(None)


def test_only_the_ten_most_frequent_values_are_listed():
    profile = processing.analyze([*string.ascii_lowercase, "z"])

    assert frequent(profile) == [("z", 2), *((letter, 1) for letter in "abcdefghi")]


@pytest.mark.parametrize(
    ("value", "shown"),
    [("x" * 64, "x" * 64), ("x" * 65, "x" * 63 + "…"), ("é" * 10**5, "é" * 63 + "…")],
)
def test_long_values_are_counted_whole_and_shown_short(value, shown):
    profile = processing.analyze([value, value, value + "other"])

    assert frequent(profile)[0] == (shown, 2)


def test_a_long_word_is_shown_short():
    assert frequent(processing.analyze("w" * 100), "most_frequent_words") == [("w" * 63 + "…", 1)]


def test_arrays_in_an_array_are_described_by_all_their_items():
    profile = processing.analyze([[1, 2], [], [6, None]])

    assert profile["types"] == {"array": 3}
    assert profile["items"]["mean"] == 3
    assert profile["items"]["missing"] == 1


# Records and objects


def test_records_are_described_field_by_field():
    records = [{"price": 2, "color": "red"}, {"price": None, "color": "red"}, {"price": 4}]

    profile = processing.analyze(records)

    assert (profile["count"], profile["types"], profile["missing"]) == (3, {"object": 3}, 0)
    assert profile["fields"]["price"]["types"] == {"number": 2}
    assert profile["fields"]["price"]["missing"] == 1
    assert profile["fields"]["price"]["mean"] == 3
    assert profile["fields"]["color"] == {
        "count": 2,
        "types": {"string": 2},
        "missing": 1,
        "most_frequent": [{"value": "red", "count": 2}],
    }
    assert profile["fields_left_out"] == 0


def test_records_within_records_are_described_together():
    records = [{"at": {"x": 1}}, {"at": {"x": 3, "y": 1}}, {"at": None}]

    at = processing.analyze(records)["fields"]["at"]

    assert (at["count"], at["missing"]) == (2, 1)
    assert at["fields"]["x"]["mean"] == 2
    assert at["fields"]["y"]["missing"] == 1


def test_each_field_of_an_object_is_described_by_itself():
    profile = processing.analyze({"n": 1, "": None, "__class__": {"list": [True]}})

    assert profile["type"] == "object"
    assert profile["fields"]["n"] == {"type": "number", "value": 1}
    assert profile["fields"][""] == {"type": "null", "value": None}
    assert profile["fields"]["__class__"]["fields"]["list"]["types"] == {"boolean": 1}
    assert profile["fields_left_out"] == 0


@pytest.mark.parametrize(
    "wrap", [lambda fields: fields, lambda fields: [fields]], ids=["object", "records"]
)
def test_fields_beyond_the_limit_are_counted_and_left_out(wrap):
    fields = {f"f{number}": {"inner": 1} for number in range(processing.MAX_FIELDS + 5)}

    profile = processing.analyze(wrap(fields))

    assert [*profile["fields"]] == [*fields][: processing.MAX_FIELDS]
    assert profile["fields_left_out"] == 5
    assert profile["fields"]["f0"]["fields_left_out"] == 1


def test_an_outer_field_is_not_left_out_for_an_inner_one():
    inner = {f"f{number}": 1 for number in range(processing.MAX_FIELDS)}

    profile = processing.analyze({"first": inner, "last": 7})

    assert profile["fields"]["last"]["value"] == 7
    assert profile["fields"]["first"]["fields_left_out"] == 2


@pytest.mark.parametrize("levels", [1, 64, 450])
@pytest.mark.parametrize(
    "wrap",
    [lambda value: [value], lambda value: {"a": value}, lambda value: [{"a": value}]],
    ids=["arrays", "objects", "records"],
)
@pytest.mark.parametrize(
    "place", [lambda data: data, lambda data: [data]], ids=["alone", "in an array"]
)
def test_deep_data_has_a_shallow_profile(levels, wrap, place):
    profile = json.dumps(processing.analyze(place(nested(levels, wrap=wrap))))

    assert profile.count('"fields"') <= processing.MAX_LEVELS + 1
    assert profile.count('"items"') <= processing.MAX_LEVELS


def test_the_iris_flowers_have_the_figures_known_from_the_books():
    data = json.loads(IRIS.read_text(encoding="utf-8"))["data"]

    fields = processing.analyze(data)["fields"]

    figures = operator.itemgetter("min", "max", "mean", "stdev")
    assert figures(fields["sepal_length"]) == pytest.approx((4.3, 7.9, 5.84, 0.83), abs=0.005)
    assert figures(fields["sepal_width"]) == pytest.approx((2.0, 4.4, 3.057, 0.436), abs=0.005)
    assert figures(fields["petal_length"]) == pytest.approx((1.0, 6.9, 3.758, 1.765), abs=0.005)
    assert figures(fields["petal_width"]) == pytest.approx((0.1, 2.5, 1.199, 0.762), abs=0.005)
    assert frequent(fields["species"]) == [("setosa", 50), ("versicolor", 50), ("virginica", 50)]


# Whatever the data


@few_examples
@given(JSON_VALUES)
@example([1e308, -1e308, 1e308, 5e-324])
@example({"k" * 100_000: ["v" * 100_000]})
@example([{f"f{number}": number for number in range(1000)}])
def test_every_json_value_has_a_small_strict_json_profile_and_is_left_unchanged(data):
    before = json.dumps(data)

    profile = processing.analyze(data)

    assert json.loads(json.dumps(profile, allow_nan=False)) == profile
    assert size(profile) <= 5 * size(data) + 400 * processing.MAX_FIELDS
    assert json.dumps(data) == before


# The loader


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Write a module of the user's and stand beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()

    yield lambda source: (tmp_path / "shop" / "prices.py").write_text(source, encoding="utf-8")

    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def refusal(path):
    """Return the only problem of a path that is refused."""
    with pytest.raises(errors.ConfigError) as caught:
        processing.load(path)
    (problem,) = caught.value.problems
    return problem


def test_the_default_analysis_is_found():
    assert processing.load("processing:analyze") is processing.analyze


def test_a_function_beside_the_start_is_found(shop):
    shop("def run(data): return data + 1")

    assert processing.load("shop.prices:run")(1) == 2


def test_an_attribute_of_an_attribute_is_found(shop):
    shop("class Prices:\n    @staticmethod\n    def run(data): return data + 1")

    assert processing.load("shop.prices:Prices.run")(1) == 2


def test_the_current_directory_is_searched_once_and_last(shop, tmp_path):
    shop("def run(data): return data")

    processing.load("shop.prices:run")
    processing.load("shop.prices:run")

    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ":",
        "shop.prices",
        "shop.prices:",
        ":run",
        "shop/prices.py:run",
        "shop:a:b",
        ".shop:run",
        "shop.prices:run()",
        "shop..prices:run",
        " shop:run",
        "shop:run\n",
    ],
)
def test_a_malformed_path_is_refused_with_the_right_form(path):
    assert refusal(path) == f"ANALYSIS={path!r}: expected package.module:function"


@pytest.mark.parametrize("module", ["shopp", "shopp.prices", "shop.price", "shop.prices.run"])
def test_a_module_that_is_not_there_is_named_with_the_place(shop, tmp_path, module):
    shop("")

    assert refusal(f"{module}:run") == (
        f"ANALYSIS='{module}:run': there is no module '{module}'"
        f" (looked in {tmp_path} and on the Python path)"
    )


@pytest.mark.parametrize("attribute", ["walk", "run.walk"])
def test_an_attribute_that_is_not_there_is_named(shop, attribute):
    shop("def run(data): return data")

    assert refusal(f"shop.prices:{attribute}") == (
        f"ANALYSIS='shop.prices:{attribute}': the module 'shop.prices' has no '{attribute}'"
    )


def test_what_cannot_be_called_is_refused(shop):
    shop("run = 5")

    assert refusal("shop.prices:run") == (
        "ANALYSIS='shop.prices:run': 'run' is no function but of type 'int'"
    )


@pytest.mark.parametrize(
    ("source", "raised"),
    [
        ("def run(:", "SyntaxError: invalid syntax (prices.py, line 1)"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('two\\n  lines')", "ValueError: two lines"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("import shop.nowhere", "ModuleNotFoundError: No module named 'shop.nowhere'"),
        ("from shop import no", "ImportError: cannot import name 'no' from 'shop'"),
        ("import sys; sys.no", "AttributeError: module 'sys' has no attribute 'no'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_in_one_line(shop, source, raised):
    shop(source)

    problem = refusal("shop.prices:run")

    assert problem.startswith(f"ANALYSIS='shop.prices:run': importing it raised {raised}")
    assert "\n" not in problem
