"""docs/examples, used as docs/guide.md says."""

import importlib
import json
from typing import Any

import pytest

from jobs import worker
from tests.harness import ROOT

EXAMPLES = ROOT / "docs" / "examples"
WEATHER = json.loads((EXAMPLES / "weather.json").read_bytes())


class Job:
    """What `analyze` needs of a job."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept
        self.notes: list[str] = []

    def progress(self, fraction: float, note: str, *, keep: Any) -> None:
        self.notes.append(note)
        assert note.endswith(list(keep)[-1])


@pytest.fixture
def weather() -> Any:
    pytest.importorskip("pandas", reason="pip install -r requirements-dev.txt")
    return importlib.import_module("docs.examples.weather")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_the_default_analysis_takes_each_payload(start_process, path):
    service = start_process(ANALYSIS="processing:analyze")

    job = service.wait_for(service.process(json.loads(path.read_bytes())))

    assert job["outcome"] == "succeeded"


@pytest.mark.usefixtures("weather")
def test_the_weather_is_summarized_by_the_service(start_process, receiver):
    service = start_process(ANALYSIS="docs.examples.weather:analyze", POSTBACK_URL=receiver.url)

    service.process(WEATHER)

    [postback] = receiver.wait_for(1, timeout=20)
    result = json.loads(postback.body)["data"]["result"]
    assert (result["warmest"], result["wettest"]) == ("2015-07", "2015-12")
    assert [month["days"] for month in result["months"].values()][:3] == [31, 28, 31]


def test_the_error_of_the_guide_is_that_of_a_number_of_numpy():
    numpy = pytest.importorskip("numpy", reason="pip install -r requirements-dev.txt")
    with pytest.raises(worker.NotJSONError) as caught:
        worker.encode({"days": numpy.int64(31)})

    assert f"`{caught.value}`" in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def test_months_that_were_kept_are_not_computed_again(weather):
    first, second = Job(None), Job({"2015-01": {"mean_max_celsius": 99, "precipitation_mm": 0}})

    weather.analyze(WEATHER["data"], first)
    result = weather.analyze(WEATHER["data"], second)

    assert (len(first.notes), len(second.notes)) == (12, 11)
    assert result["warmest"] == "2015-01"
