"""The page, as a person meets it: in a real Chromium. One browser serves the whole module."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from selenium import webdriver
from selenium.common import exceptions
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from jobs.model import State
from tests.harness import Caller, RealProcess, act, poll
from tests.receiver import reply

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

JSON = {"Content-Type": "application/json"}

#: The page asks every 1.5 s, and a browser takes its time on a busy machine.
PATIENCE_SECONDS = 20

#: Not a sandbox inside the sandbox of a container, and nobody is called.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.timeout(90),
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no browser: apt install chromium chromium-driver",
    ),
]


class Page:
    """What a person sees and does."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, service: Caller, address: str = "") -> None:
        self.driver.get(f"{service.base_url}/{address}")
        self.wait("#connection", "connected")

    def open_job(self, service: Caller, job_id: str) -> None:
        self.open(service, f"#/jobs/{job_id}")
        self.wait("#job-title", job_id)

    def look(self, selector: str) -> str:
        """Return what can be read at a place; nothing where it is hidden or not there."""
        with contextlib.suppress(exceptions.StaleElementReferenceException):
            found = self.driver.find_elements("css selector", selector)
            return "\n".join(element.text for element in found)
        return ""

    def wait(self, selector: str, *texts: str) -> str:
        def find() -> str | None:
            seen = self.look(selector)
            return seen if all(text in seen for text in texts) else None

        return poll(find, f"{texts} at {selector}", PATIENCE_SECONDS)

    def gone(self, selector: str, text: str) -> None:
        what = f"no more {text} at {selector}"
        poll(lambda: text not in self.look(selector), what, PATIENCE_SECONDS)

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

    def confirm(self) -> None:
        self.driver.switch_to.alert.accept()

    def write(self, selector: str, text: str) -> None:
        field = self.driver.find_element("css selector", selector)
        field.clear()
        field.send_keys(text)

    def choose(self, selector: str, text: str) -> None:
        Select(self.driver.find_element("css selector", selector)).select_by_visible_text(text)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def rectangle(self, selector: str) -> dict[str, float]:
        element = poll(lambda: self.driver.find_elements("css selector", selector), selector)[0]
        return dict(element.rect)

    def emulate(self, *, width: int = 1280, scheme: str = "light") -> None:
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
def own(start_process) -> RealProcess:
    """A service with its built-in receiver, and signatures."""
    service: RealProcess = start_process(POSTBACK_SECRET=SECRET)
    return service


@pytest.fixture
def posting(start_process, receiver) -> Callable[..., RealProcess]:
    """Return a function that starts a service which posts to `receiver`."""
    return lambda **settings: start_process(POSTBACK_URL=receiver.url, **settings)


# Sending


def test_an_empty_page_says_what_to_do_first(page, own):
    page.open(own)

    assert "Press Send above" in page.wait("#no-jobs", "No job yet")
    assert f"curl {own.base_url}/process" in page.look("#curl")
    assert page.look("#filter").split() == ["every", "state", *State]


def test_a_job_that_is_sent_is_delivered_received_and_counted(page, own):
    page.open(own)
    page.write("#send-metadata", '{"order": 17}')

    page.click("#send button")

    page.wait("#sent", "Accepted as")
    page.wait("#jobs tbody tr:first-child", "delivered", "succeeded", '{"order":17}')
    page.wait("#received tbody tr:first-child", "job.succeeded", "good")
    page.wait("#legend", "accepted 1", "delivered 1")
    assert page.look("#jobs-axis").split() == ["2", "1", "0"]
    assert "ms" in page.look("#p99-axis")


def test_a_refused_payload_is_red_and_says_what_to_do(page, own):
    page.open(own)
    for field, text, detail in (
        ("#send-url", "https://example.com/", "POSTBACK_ALLOW"),
        ("#send-metadata", "[]", "metadata is not an object; send"),
        ("#send-data", "[1, 2", "Data is not valid JSON. Write it like"),
    ):
        page.write(field, text)
        page.click("#send button")

        page.wait("#sent.error", detail)


def test_the_curl_lines_send_the_same_again(page, own):
    own.wait_for(own.process({"data": "it's", "metadata": {"big": 9007199254740993}}))
    page.open(own)
    page.click("#jobs tbody a")
    page.wait("#data", "it's")

    page.click("#copy-job")

    page.wait("#copy-job", "Copied")
    again = subprocess.run(page.clipboard(), shell=True, capture_output=True, check=True)
    job = own.wait_for(json.loads(again.stdout)["id"])
    assert (job["data"], job["metadata"]) == ("it's", {"big": 9007199254740993})


# Jobs


def test_a_job_has_an_address_and_the_back_button_leads_back(page, own):
    job_id = own.process({"data": 1})
    own.wait_for(job_id)
    page.open(own)

    page.click("#jobs tbody a")
    page.wait("#job-title", job_id)
    assert page.driver.current_url == f"{own.base_url}/#/jobs/{job_id}"

    page.driver.back()
    page.gone("#job-title", job_id)
    page.driver.forward()
    page.wait("#job-title", job_id)
    page.click("#close")
    page.gone("#job-title", job_id)
    assert page.driver.current_url == f"{own.base_url}/#/"
    page.open(own, "#/jobs/1234")
    page.wait("#notice.error", "No job has the id '1234'")


def test_attempts_are_shown_with_answers_and_a_resend_adds_one(page, posting, receiver):
    receiver.answers = [reply(503, b'{"error": "The database is down"}'), 500]
    service = posting(POSTBACK_SCHEDULE="50ms 50ms")
    job_id = service.process({"data": [1, 2, 6]})
    service.wait_for(job_id)

    page.open_job(service, job_id)

    page.wait("#attempts tbody tr:first-child", "503 Service Unavailable", "database is down")
    page.wait("#attempts tbody tr:nth-child(3)", "204")
    page.wait("#data", "6")
    page.wait("#ending", "6")
    page.click("#resend")
    page.wait("#acted", "The event is sent again.")
    page.wait("#attempts tbody tr:nth-child(4)", "204")
    assert page.look("#attempts tbody").count("500 Internal Server Error") == 1


def test_an_analysis_that_will_run_again_tells_when_and_why(page, start_process):
    service = start_process(ANALYSIS_SCHEDULE="1h")
    job_id = service.send(act("fail_at_first", 1))
    poll(lambda: service.job(job_id)["last_error"], "the first run to fail")

    page.open_job(service, job_id)

    page.wait("#facts", "start 2 in 59 min", "ValueError: run 1")
    page.click("#cancel")
    page.wait("#acted", "The job is canceled.")
    page.wait("#facts", "canceled")


def test_a_failed_job_shows_its_error_and_is_deleted(page, own):
    job_id = own.send(act("fail", 1))
    own.wait_for(job_id)
    page.open_job(own, job_id)
    page.wait("#ending", "ValueError: cannot analyze 1")

    page.click("#delete")
    page.confirm()

    page.wait("#notice", "is deleted")
    page.wait("#no-jobs", "No job yet")
    assert own.get(f"/jobs/{job_id}").status_code == 404


def test_all_undelivered_jobs_are_resent_at_once(page, posting, receiver):
    receiver.default = 500
    service = posting(POSTBACK_SCHEDULE="none")
    service.wait_for_all([service.send(n) for n in (1, 2)])
    receiver.default = 204
    page.open(service)

    page.click("#resend-all")
    page.confirm()

    page.wait("#notice", "2 events are sent again.")
    page.gone("#jobs tbody", "undelivered")


def test_jobs_are_found_by_state_metadata_and_id(page, own, gate):
    first = own.send(1, metadata={"order": "Seventeen"})
    own.wait_for(first)
    second = own.send(gate.data, metadata={"order": "Eighteen"})
    page.open(own)
    page.wait("#jobs tbody", first[-10:], second[-10:])

    page.choose("#filter", "running")
    page.gone("#jobs tbody", first[-10:])
    page.choose("#filter", "every state")
    page.write("#search", "order seventeen")
    page.gone("#jobs tbody", second[-10:])
    page.wait("#jobs tbody", first[-10:])
    page.write("#search", "nothing like it")
    page.wait("#none-found", "No job was found.")
    page.write("#search", second)

    page.wait("#job-title", second)


def test_older_jobs_are_a_page_away_and_newer_ones_lead_back(page, own):
    first, *_, last = [own.process({"data": n + 1}) for n in range(30)]
    page.open(own)
    page.wait("#jobs tbody", last[-10:])

    page.click("#older")

    page.wait("#jobs tbody", first[-10:])
    page.click("#newer")
    page.wait("#jobs tbody", last[-10:])


HOSTILE = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>"


def test_scripts_in_data_metadata_and_answers_are_only_text(page, posting, receiver):
    receiver.default = reply(500, HOSTILE.encode())
    service = posting(POSTBACK_SCHEDULE="none")
    job_id = service.send(HOSTILE, metadata={HOSTILE: HOSTILE})
    service.wait_for(job_id)

    page.open_job(service, job_id)

    for place in ("#data", "#ending", "#facts", "#attempts tbody"):
        page.wait(place, "<script>")
    assert page.run("return document.title") == "Postback"


def test_a_postback_of_an_odd_type_breaks_nothing(page, start_process):
    service = start_process()
    for event in (b'{"type": {"toString": 1, "valueOf": 1}}', b'{"type": 12345678901234567890}'):
        requests.post(f"{service.base_url}/postprocessed", data=event, headers=JSON, timeout=10)

    page.open(service)

    page.wait("#received tbody", "not signed")
    page.wait("#connection", "connected")


# The service as it is


def test_a_lost_service_is_told_and_found_again(page, own):
    page.open(own)
    own._env["PORT"] = own.base_url.rpartition(":")[2]
    own.end()

    page.wait("#connection", "does not answer")

    own.start()
    page.wait("#connection", "connected")


def test_the_token_is_asked_for_until_it_is_right_and_kept_for_the_tab(page, start_process):
    service = start_process(API_TOKEN="sesame")
    job_id = service.process({"data": 1}, {"Authorization": "Bearer sesame"})
    page.driver.get(f"{service.base_url}/#/jobs/{job_id}")
    page.wait("#token-title", "needs a token")
    page.write("#token-value", "wrong\n")
    page.wait("#token-title", "refused this token")

    page.write("#token-value", "sesame\n")

    page.wait("#job-title", job_id)
    assert page.run("return [sessionStorage.length, localStorage.length]") == [1, 0]
    assert "$API_TOKEN" in page.look("#curl")


# Looks, phones and keyboards


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_is_as_light_or_dark_as_the_system(page, own, width, scheme):
    job_id = own.send("x" * 500, metadata={"note": "y" * 500})
    own.wait_for(job_id)
    page.emulate(width=width, scheme=scheme)
    page.open(own)
    page.wait("#jobs tbody", "delivered")

    page.click("#jobs tbody a")
    page.wait("#job-title", job_id)

    ground = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(ground) < 128) is (scheme == "dark")
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run("const it = document.querySelector('#job'); return it.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 390])
def test_progress_is_seen_and_the_row_keeps_its_height(page, own, tmp_path, width):
    own.send(act("report", [0.5, "half of it", str(tmp_path / "gate")]))
    page.emulate(width=width)
    page.open(own)

    page.wait("#jobs tbody", "50 %")
    bar, row = page.rectangle("#jobs progress"), page.rectangle("#jobs tbody tr")
    page.click("#jobs tbody a")

    assert (bar["width"] > 40, bar["height"] > 5) == (True, True)
    page.wait("#facts", "50 % half of it")
    (tmp_path / "gate").touch()
    page.wait("#jobs tbody", "delivered", "succeeded")
    assert page.rectangle("#jobs tbody tr")["height"] == row["height"]


def test_everything_can_be_done_by_keyboard(page, own):
    job_id = own.send(1)
    own.wait_for(job_id)
    page.open(own)
    page.wait("#jobs tbody", "delivered")

    page.run("document.querySelector('#send-data').focus()")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.wait("#sent", "Accepted")
    page.run(f"document.querySelector('[href$=\"{job_id}\"]').focus()")
    page.press(Keys.ENTER)
    page.wait("#job-title", job_id)
    page.press(Keys.ESCAPE)

    page.gone("#job-title", job_id)
    assert page.run("return document.activeElement.href").endswith(job_id)
