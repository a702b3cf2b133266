"""What EXECUTOR=dask promises: with a real scheduler and real workers, which are killed."""

import logging
import sys
import threading

import pytest

import processing
from jobs import dask_executor, errors
from jobs.dask_executor import DaskExecutor
from tests.cluster import Cluster
from tests.harness import ROOT, events, poll

distributed = pytest.importorskip("distributed", reason="pip install -r requirements-dask.txt")

pytestmark = pytest.mark.service

UPLOAD = {"EXECUTOR": "dask", "DASK_UPLOAD": str(ROOT / "tests" / "uploaded.py")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster that lives as long as the tests of this file."""
    one = Cluster(tmp_path_factory.mktemp("cluster")).start(workers=1)
    yield one
    one.kill()


@pytest.fixture
def own_cluster(tmp_path):
    """A cluster that is not started yet, for a test that kills it."""
    one = Cluster(tmp_path)
    yield one
    one.kill()


@pytest.fixture
def serve(start, receiver):
    """Return a function that starts the service with an analysis on a cluster."""

    def serve(on, name, **settings):
        analysis = {"ANALYSIS": f"uploaded:{name}", "POSTBACK_URL": receiver.url}
        return start(**(UPLOAD | analysis | {"DASK_SCHEDULER": on.address} | settings))

    return serve


def posted(receiver):
    return {event["data"]["id"]: event["data"]["outcome"] for event in events(receiver.requests)}


def meeting(directory, name="met"):
    """Return a payload to wait with, the file that tells it runs, and the one that ends it."""
    here, there = directory / f"{name}.here", directory / f"{name}.there"
    return {"data": {"here": str(here), "there": str(there)}}, here, there


def test_results_failures_and_progress_come_from_the_cluster(cluster, serve, receiver, tmp_path):
    service = serve(cluster, "report")
    poll(lambda: service.get("/readyz").ok, "the cluster")
    job_id = service.process({"data": str(tmp_path / "go")})

    progress = poll(lambda: service.job(job_id)["progress"], "a report")
    (tmp_path / "go").touch()
    job = service.wait_for(job_id)

    assert (progress["fraction"], progress["note"]) == (0.5, "half")
    assert (job["result"], job["progress"]) == ("told", None)
    assert posted(receiver) == {job_id: "succeeded"}


@pytest.mark.parametrize(("name", "kind"), [("fail", "ValueError"), ("nothing", "ConfigError")])
def test_an_analysis_that_raises_or_is_not_there_fails_its_jobs(cluster, serve, name, kind):
    service = serve(cluster, name)

    job = service.wait_for(service.process({"data": 1}))

    assert (job["outcome"], job["error"]["type"]) == ("failed", kind)


def test_cancel_and_job_timeout_end_a_job_though_its_worker_goes_on(
    cluster, serve, receiver, tmp_path
):
    service = serve(cluster, "meet", JOB_TIMEOUT="1s")
    payload, here, there = meeting(tmp_path)
    other_payload, other_here, _ = meeting(tmp_path, "other")
    other_payload["data"]["there"] = str(there)
    canceled, timed_out = service.process(payload), service.process(other_payload)
    poll(lambda: here.exists() and other_here.exists(), "both run")

    service.post(f"/jobs/{canceled}/cancel")
    jobs = [service.wait_for(job_id) for job_id in (canceled, timed_out)]
    poll(lambda: not service.service.runner.outlived, "the threads' end", timeout=2)
    there.touch()

    assert [job["outcome"] for job in jobs] == ["canceled", "timed_out"]
    assert posted(receiver) == {canceled: "canceled", timed_out: "timed_out"}
    assert len(receiver.requests) == 2


def test_a_job_that_was_woken_for_nothing_can_still_be_stopped(cluster, serve, tmp_path):
    service = serve(cluster, "meet")
    payload, here, there = meeting(tmp_path)
    job_id = service.process(payload)
    poll(here.exists, "it runs")
    service.service._executor._running[job_id].woken.set()

    service.post(f"/jobs/{job_id}/cancel")
    poll(lambda: not service.service.runner.outlived, "the thread's end", timeout=2)
    there.touch()

    assert service.wait_for(job_id)["outcome"] == "canceled"


def test_jobs_of_a_killed_service_are_delivered_by_its_next_start(
    cluster, start_process, receiver, tmp_path
):
    payload, here, there = meeting(tmp_path)
    settings = {"DASK_SCHEDULER": cluster.address, "ANALYSIS": "uploaded:meet"} | UPLOAD
    service = start_process(POSTBACK_URL=receiver.url, **settings)
    job_id = service.process(payload)
    poll(here.exists, "it runs")

    service.kill()
    there.touch()
    service.start()

    assert service.wait_for(job_id)["starts"] == 2
    assert posted(receiver) == {job_id: "succeeded"}


def test_a_job_whose_worker_is_killed_is_run_again_by_another(
    own_cluster, serve, receiver, tmp_path
):
    own_cluster.start(workers=1)
    service = serve(own_cluster, "meet")
    payload, here, there = meeting(tmp_path)
    job_id = service.process(payload)
    poll(here.exists, "it runs")

    own_cluster.kill_worker()
    there.touch()
    own_cluster.start_worker()

    assert service.wait_for(job_id)["starts"] == 1
    assert posted(receiver) == {job_id: "succeeded"}


def test_a_job_that_kills_each_worker_is_crashed_after_a_few_tries(own_cluster, serve, receiver):
    own_cluster.start(workers=2)
    service = serve(own_cluster, "end")

    job = service.wait_for(service.process({"data": 3}))

    assert job["outcome"] == "crashed"
    assert "ended its Dask workers" in job["error"]["message"]
    assert [worker.wait(5) for worker in own_cluster.workers] == [3, 3]
    assert posted(receiver) == {job["id"]: "crashed"}


@pytest.mark.slow
def test_a_cluster_that_is_away_at_start_or_lost_later_is_waited_for(
    own_cluster, serve, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "postback")
    monkeypatch.setattr(dask_executor, "RETRY_SECONDS", 0.05)
    service = serve(own_cluster, "meet")
    payload, here, there = meeting(tmp_path)
    job_id = service.process(payload)
    poll(lambda: "cluster away" in caplog.text, "the line")
    away = service.get("/readyz")
    own_cluster.start(workers=1)
    poll(here.exists, "it runs", timeout=20)
    connected = service.get("/readyz")

    own_cluster.kill()
    poll(lambda: service.get("/readyz").status_code == 503, "the loss")
    there.touch()
    own_cluster.start(workers=1)
    job = service.wait_for(job_id, timeout=20)

    assert (away.status_code, connected.status_code) == (503, 200)
    assert "Jobs are accepted, and wait." in away.json()["detail"]
    assert (job["outcome"], job["starts"]) == ("succeeded", 1)
    told = [one.message for one in caplog.records if one.message.startswith("cluster")]
    assert told == ["cluster away", "cluster connected"] * 2


def test_a_cluster_that_stays_away_costs_no_thread_for_each_try(monkeypatch):
    monkeypatch.setattr(dask_executor, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(dask_executor, "RETRY_SECONDS", 0.01)
    tries = []
    connect = DaskExecutor._connect

    def try_to_connect(*args):
        tries.append(1)
        return connect(*args)

    monkeypatch.setattr(DaskExecutor, "_connect", try_to_connect)
    one = DaskExecutor(
        processing.load,
        "tests.analyses:echo",
        scheduler_url="tcp://127.0.0.1:9",
        upload_path=None,
    )
    one.start()
    try:
        poll(lambda: len(tries) > 2, "two tries")
        before = threading.active_count()
        poll(lambda: len(tries) > 8, "six more")
        assert threading.active_count() <= before
    finally:
        one.close()


def test_a_file_that_the_workers_cannot_import_is_told_at_each_try(
    cluster, serve, tmp_path, monkeypatch
):
    monkeypatch.setattr(dask_executor, "RETRY_SECONDS", 0.05)
    (tmp_path / "broken.py").write_text("1 / 0")
    service = serve(cluster, "echo", DASK_UPLOAD=str(tmp_path / "broken.py"))

    poll(lambda: "division by zero" in service.get("/readyz").text, "the failure")
    details = [service.get("/readyz").json()["detail"] for _ in range(100)]

    assert set(details) == {details[0]}
    assert "cannot be used: division by zero" in details[0]


def test_a_job_that_somebody_else_cancels_on_the_cluster_is_submitted_again(
    cluster, serve, tmp_path
):
    service = serve(cluster, "meet")
    payload, here, there = meeting(tmp_path)
    job_id = service.process(payload)
    poll(here.exists, "it runs")
    client = service.service._executor._client
    [key] = client.futures
    here.unlink()

    client.cancel([distributed.Future(key, client)], force=True)
    poll(here.exists, "it runs again")
    there.touch()

    assert service.wait_for(job_id)["outcome"] == "succeeded"


def test_what_cannot_be_sent_to_the_cluster_fails_its_job(cluster, serve):
    service = serve(cluster, "echo")
    service.service._executor._name = threading.Lock()

    job = service.wait_for(service.process({"data": 1}))

    assert (job["outcome"], job["error"]["type"]) == ("failed", "TypeError")


def test_a_stop_and_a_report_of_a_job_that_is_gone_are_passed_over(cluster):
    one = DaskExecutor(processing.load, "", scheduler_url=cluster.address, upload_path=None)

    one._hear((0.0, ("gone", 0.5, "")))

    assert one.stop("gone")


def test_a_stop_does_not_wait_for_a_cluster_that_is_away(own_cluster, start_process):
    settings = {"EXECUTOR": "dask", "DASK_SCHEDULER": own_cluster.address, "DRAIN": "100ms"}
    service = start_process(**settings)
    service.process({"data": 1})

    assert service.end(timeout=5) == 75


def test_without_distributed_the_start_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    one = DaskExecutor(processing.load, "", scheduler_url="tcp://127.0.0.1:1", upload_path=None)

    with pytest.raises(errors.ConfigError, match=r"pip install -r requirements-dask\.txt"):
        one.start()
