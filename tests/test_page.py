"""The page, as a person meets it: in a real Chromium. One browser serves the whole module."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.common import exceptions
from selenium.webdriver.common.keys import Keys

import app
import config
from tests import analyses
from tests.harness import InProcess, poll

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

#: Not a sandbox inside the sandbox of a container, and nobody is called.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no browser: apt install chromium chromium-driver",
    ),
]


class Page:
    """What a person sees and does."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, service: InProcess) -> None:
        self.driver.get(service.base_url + "/")
        self.wait("#connection", "connected")

    def look(self, selector: str) -> str:
        """Return what can be read at a place; nothing where it is hidden or not there."""
        with contextlib.suppress(exceptions.StaleElementReferenceException):
            return "\n".join(
                element.text for element in self.driver.find_elements("css selector", selector)
            )
        return ""

    def wait(self, selector: str, *texts: str) -> str:
        def find() -> str | None:
            seen = self.look(selector)
            return seen if all(text in seen for text in texts) else None

        return poll(find, f"{texts} at {selector}")

    def gone(self, selector: str, text: str) -> None:
        poll(lambda: text not in self.look(selector), f"no more {text} at {selector}")

    def click(self, selector: str) -> None:
        def press() -> bool:
            with contextlib.suppress(
                exceptions.StaleElementReferenceException, exceptions.NoSuchElementException
            ):
                element = self.driver.find_element("css selector", selector)
                if element.is_enabled():
                    element.click()
                    return True
            return False

        poll(press, f"{selector} to press")

    def write(self, selector: str, text: str) -> None:
        field = self.driver.find_element("css selector", selector)
        field.clear()
        field.send_keys(text)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def send(self, payload: str) -> None:
        self.write("#payload", payload)
        self.click("#send button")

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def emulate(self, *, width: int = 1200, scheme: str = "light") -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def clipboard(self) -> str:
        permission = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", permission)
        return str(
            self.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        )

    def complaints(self) -> list[str]:
        """Return what the browser complained of, but for answers that refuse or do not come."""
        entries: list[dict[str, Any]] = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["source"] != "network"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver) -> Iterator[Page]:
    one = Page(driver)
    one.emulate()
    yield one
    complaints = one.complaints()
    driver.get("about:blank")  # it must not ask the next service
    assert not complaints


@pytest.fixture
def own(start) -> InProcess:
    """The service with its built-in receiver, and signatures."""
    service: InProcess = start(POSTBACK_SECRET=SECRET)
    return service


@pytest.fixture
def slow(start) -> InProcess:
    """The service whose analysis takes as many seconds as it is told."""
    service: InProcess = start(ANALYSIS="time:sleep", DRAIN="1ms")
    return service


def test_an_empty_page_says_what_to_do_first(page, own):
    page.open(own)

    assert "Press Send above" in page.wait("#no-jobs", "No job yet")
    assert f"curl {own.base_url}/process" in page.look("#curl")


def test_a_job_that_is_sent_shows_up_as_delivered_and_received(page, own):
    page.open(own)

    page.click("#send button")

    assert "Accepted as" in page.wait("#sent", "Accepted")
    page.wait("#jobs tbody tr:first-child", "delivered", "succeeded")
    page.wait("#received tbody tr:first-child", "job.succeeded", "good")
    page.wait("#legend", "accepted 1", "delivered 1")


def test_a_refused_payload_shows_what_to_do(page, own):
    page.open(own)

    page.send("{}")

    page.wait("#sent", "Missing data")


def test_a_job_opens_with_its_data_its_result_and_every_attempt(page, start, receiver):
    receiver.answers = [503]
    service = start(POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="50ms")
    job_id = service.process({"data": [1, 2, 6]})
    service.wait_for(job_id)
    page.open(service)

    page.click("#jobs .id")

    page.wait("#job-title", job_id)
    assert page.look("#attempts tbody").count("Service Unavailable") == 1
    page.wait("#attempts tbody tr:nth-child(2)", "204")
    page.wait("#data", "6")
    page.wait("#ending", '"mean": 3')


def test_the_error_of_a_failed_analysis_is_shown(page, start):
    service = start(ANALYSIS="math:sqrt")
    service.wait_for(service.process({"data": -1}))
    page.open(service)

    page.click("#jobs .id")

    page.wait("#ending-title", "Error")
    page.wait("#ending", "ValueError")


def test_an_ended_job_is_resent_and_shows_the_second_attempt(page, own):
    own.wait_for(own.process({"data": 1}))
    page.open(own)
    page.click("#jobs .id")

    page.click("#resend")

    page.wait("#acted", "delivering again")
    page.wait("#attempts tbody tr:nth-child(2)", "200")


def test_a_running_job_is_canceled(page, slow):
    slow.process({"data": 2})
    page.open(slow)
    page.wait("#jobs tbody", "running")
    page.click("#jobs .id")

    page.click("#cancel")

    page.wait("#acted", "Canceled")
    page.wait("#facts", "canceled")


def test_a_running_job_shows_how_far_it_is(page, start, gate):
    service = start(ANALYSIS="tests.test_page:half")
    service.process({"data": 1})
    page.open(service)

    bar = poll(lambda: page.driver.find_elements("css selector", "#jobs progress"), "the bar")[0]

    assert float(bar.get_attribute("value")) == 0.5
    page.click("#jobs .id")
    page.wait("#facts", "50 % half of it")
    gate.open()


def half(data: Any, progress: Any) -> Any:
    """Is an analysis: it tells that it has done half, and waits."""
    progress(0.5, "half of it")
    return analyses.wait(data)


def test_the_filter_shows_jobs_of_one_state_only(page, slow):
    slow.process({"data": 2})
    slow.wait_for(slow.process({"data": 0}))
    page.open(slow)
    page.wait("#jobs tbody", "running", "delivered")

    page.driver.find_element("css selector", "#filter").send_keys("running")

    page.gone("#jobs tbody", "delivered")
    assert "running" in page.look("#jobs tbody")


def test_older_jobs_are_a_page_away_and_newer_ones_lead_back(page, own):
    first, *_, last = [own.process({"data": n + 1}) for n in range(30)]
    page.open(own)
    page.wait("#jobs tbody", last[-10:])

    page.click("#older")

    page.wait("#jobs tbody", first[-10:])
    page.click("#newer")
    page.wait("#jobs tbody", last[-10:])


def test_a_lost_service_is_told_and_found_again(page, own, monkeypatch):
    page.open(own)
    port = own.base_url.rpartition(":")[2]
    own.service.stop()

    page.wait("#connection", "does not answer")

    monkeypatch.setenv("PORT", port)
    own.service = app.Service(config.load())
    own.service.start()
    page.wait("#connection", "connected")


HOSTILE = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>"


def test_a_script_in_the_data_is_only_text(page, start):
    service = start(ANALYSIS="builtins:str")
    service.wait_for(service.process({"data": HOSTILE}))
    page.open(service)

    page.click("#jobs .id")

    page.wait("#data", "<script>")
    page.wait("#ending", "<script>")
    assert page.run("return document.title") == "Postback"


def test_the_token_is_asked_for_and_kept_for_the_tab(page, start):
    service = start(API_TOKEN="sesame")
    page.driver.get(service.base_url + "/")
    page.wait("#token-title", "needs a token")

    page.write("#token-value", "sesame\n")

    page.wait("#connection", "connected")
    assert page.run("return [sessionStorage.length, localStorage.length]") == [1, 0]
    assert "$API_TOKEN" in page.look("#curl")


def test_a_wrong_token_is_asked_for_again(page, start):
    service = start(API_TOKEN="sesame")
    page.driver.get(service.base_url + "/")
    page.wait("#token-title", "needs a token")

    page.write("#token-value", "wrong\n")

    page.wait("#token-title", "refused this token")


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_the_page_is_as_light_or_dark_as_the_system(page, own, scheme, is_dark):
    page.emulate(scheme=scheme)
    page.open(own)

    ground = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")

    assert (int(ground) < 128) is is_dark


@pytest.mark.parametrize("opened", [None, "#jobs .id"])
def test_nothing_is_wider_than_a_phone(page, own, opened):
    own.wait_for(own.process({"data": "x" * 500}))
    page.emulate(width=360)
    page.open(own)
    page.wait("#jobs tbody", "delivered")

    opened and page.click(opened)

    assert page.run("return document.documentElement.scrollWidth") == 360
    assert page.run("return document.querySelector('#job').scrollWidth") <= 360


def test_everything_can_be_done_by_keyboard(page, own):
    job_id = own.process({"data": 1})
    own.wait_for(job_id)
    page.open(own)
    page.wait("#jobs tbody", "delivered")

    page.run("document.querySelector('#payload').focus()")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.wait("#sent", "Accepted")
    page.run(f"document.querySelector('[data-id=\"{job_id}\"]').focus()")
    page.press(Keys.ENTER)
    page.wait("#job-title", job_id)
    page.press(Keys.ESCAPE)

    poll(lambda: not page.look("#job-title"), "the dialog to close")
    assert page.run("return document.activeElement.dataset.id") == job_id


def test_the_curl_line_of_a_job_sends_the_same_data_again(page, own):
    own.wait_for(own.process({"data": "it's"}))
    page.open(own)
    page.click("#jobs .id")
    page.wait("#data", "it's")

    page.click("#copy-job")

    page.wait("#copy-job", "Copied")
    again = subprocess.run(page.clipboard(), shell=True, capture_output=True, check=True)
    job_id = json.loads(again.stdout)["id"]
    assert own.wait_for(job_id)["data"] == "it's"


def test_nothing_on_the_page_comes_from_elsewhere(own):
    answers = [own.get(path) for path in ("/", "/page.css", "/page.js", "/icon.svg")]

    assert [answer.status_code for answer in answers] == [200] * 4
    assert all("default-src 'self'" in one.headers["Content-Security-Policy"] for one in answers)
    text = "".join(answer.text for answer in answers).replace("http://www.w3.org/2000/svg", "")
    assert "//" not in text.replace(own.base_url, "").replace("// ", "")
