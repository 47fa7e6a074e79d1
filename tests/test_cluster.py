"""A real cluster of real processes: NATS, gateway, scheduler, two workers, two shards. Its parts are killed in turn."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.cluster import Cluster, cluster
from services.gateway.samples import SAMPLES, Sample

pytestmark = pytest.mark.cluster

LOAD_SECONDS = 12.0  # interpreter, torch and models/tiny on two busy cores


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with cluster(workers=2, shards=2, device="cpu") as one:
        yield one


@pytest.fixture
def client(running: Cluster) -> openai.OpenAI:
    running.wait_ready(30)
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


def story(client: openai.OpenAI, started: threading.Event, tokens: int = 1500) -> tuple[int, float, str]:
    """Stream a long text: (tokens received, when it ended, the error that ended it or '').

    A chunk may hold several tokens (those a gateway missed come at once), so usage tells how many there were."""
    count, error = 0, ""
    try:
        stream = client.completions.create(
            model="tiny",
            prompt="Once upon a time",
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            count = chunk.usage.completion_tokens if chunk.usage else count
            if count >= 5:
                started.set()
    except (openai.APIError, httpx.HTTPError) as problem:
        error = repr(problem)
    started.set()
    return count, time.monotonic(), error


def tell_stories(client: openai.OpenAI, pool: ThreadPoolExecutor, count: int, tokens: int = 1500) -> list[Future]:
    """`count` long streams, all of which have begun."""
    events = [threading.Event() for _ in range(count)]
    futures = [pool.submit(story, client, event, tokens) for event in events]
    assert all(event.wait(30) for event in events)
    return futures


def kill(running: Cluster, service: str, index: int = 0) -> float:
    os.kill(running.actor_pids(service)[index], signal.SIGKILL)
    return time.monotonic()


def ask(client: openai.OpenAI) -> str:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What is 47 + 85?"}], temperature=0, max_tokens=300
    )
    return answer.choices[0].message.content or ""


def wait_until(condition, seconds: float, what: str) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, what
        time.sleep(0.05)
    return time.monotonic() - started


def metric(running: Cluster, name: str) -> float:
    text = urllib.request.urlopen(f"{running.url}/metrics", timeout=5).read().decode()
    return sum(float(v) for v in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def test_the_question(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What is 47 + 85?"}], temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    answer = "".join(d.content or "" for d in deltas)
    assert "132" in answer and "7 + 5" in reasoning and "think>" not in answer + reasoning


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.name) for s in SAMPLES if s.call])
def test_an_example_of_the_docs_with_the_model_in_the_box(
    running: Cluster, client: openai.OpenAI, sample: Sample, capsys: pytest.CaptureFixture[str]
):
    names: dict[str, Any] = {}
    exec(compile(sample.python(running.url, "tiny"), sample.name, "exec"), names)
    names["client"].close()
    shown = capsys.readouterr().out.strip()
    assert shown
    if sample.name == "json":
        assert set(json.loads(shown)) == {"sum"}
    if sample.name == "tool":
        function, _, arguments = shown.partition(" ")
        assert function == "add" and set(json.loads(arguments)) == {"a", "b"}


def test_a_killed_shard_ends_requests_with_an_error_and_comes_back(running: Cluster, client: openai.OpenAI):
    with ThreadPoolExecutor() as pool:
        streams = tell_stories(client, pool, 4)
        died = kill(running, "expert_shard")
        for stream in streams:
            count, ended, error = stream.result(10)
            assert ended - died < 2.0 and count < 1500 and "expert" in error.lower()
    wait_until(running.is_ready, 3 + LOAD_SECONDS, "the shard is not back")
    assert "132" in ask(client)


def test_a_killed_worker_ends_its_requests_and_the_others_go_on(running: Cluster, client: openai.OpenAI):
    with ThreadPoolExecutor() as pool:
        streams = tell_stories(client, pool, 6, tokens=200)
        died = kill(running, "gpu_worker")
        results = [stream.result(60) for stream in streams]
    failed = [r for r in results if r[2]]
    assert failed and len(failed) < 6, "the streams were spread over both workers"
    assert all(ended - died < 2.0 for _, ended, _ in failed)
    assert all(count >= 200 for count, _, error in results if not error)
    assert "132" in ask(client)
    wait_until(lambda: len(running.actor_pids("gpu_worker")) == 2, 3, "the worker is not restarted")


def test_streams_outlive_the_scheduler(running: Cluster, client: openai.OpenAI):
    with ThreadPoolExecutor() as pool:
        streams = tell_stories(client, pool, 2, tokens=300)
        kill(running, "scheduler")
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client)
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
        assert [s.result(60)[2] for s in streams] == ["", ""]
    wait_until(running.is_ready, 3 + LOAD_SECONDS, "the scheduler is not back")
    assert "132" in ask(client)


def test_streams_outlive_nats(running: Cluster, client: openai.OpenAI):
    with ThreadPoolExecutor() as pool:
        streams = tell_stories(client, pool, 2, tokens=300)
        (server,) = [p for p in running.pids("nats-server") if "supervisor" not in _line(p)]
        os.kill(server, signal.SIGKILL)
        results = [s.result(60) for s in streams]
        assert [(count >= 300, error) for count, _, error in results] == [(True, "")] * 2
    wait_until(running.is_ready, 3 + LOAD_SECONDS, "NATS is not back")
    assert "132" in ask(client)


def test_a_killed_gateway_frees_its_pages(running: Cluster, client: openai.OpenAI):
    with ThreadPoolExecutor() as pool:
        streams = tell_stories(client, pool, 3)
        kill(running, "gateway")
        assert all(stream.result(5)[2] for stream in streams)
    wait_until(running.is_ready, 3 + LOAD_SECONDS, "the gateway is not back")
    wait_until(lambda: metric(running, "moecule_kv_pages_used") == 0, 4, "its pages are not free")


def test_a_client_that_leaves_is_an_abort(running: Cluster, client: openai.OpenAI):
    url, body = (
        f"{running.url}/v1/completions",
        {"model": "tiny", "prompt": "Once", "max_tokens": 3000, "ignore_eos": True},
    )
    with httpx.stream("POST", url, json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        assert answer.status_code == 200, f"{first}\n{running.output()[-3000:]}"
        try:
            wait_until(lambda: metric(running, "moecule_num_requests_running") == 1, 1, "the request does not run")
        except AssertionError:  # seen under load, not yet why: what the stream and the actors say is to tell
            pytest.fail(f"its first line {first}, its last {list(lines)[-3:]}\n{running.output()[-3000:]}")
    wait_until(lambda: metric(running, "moecule_num_requests_running") == 0, 1, "the request still runs")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, timeout=0.5)
    wait_until(lambda: metric(running, "moecule_num_requests_running") == 0, 1, "the request still runs")


def test_sigterm_finishes_what_is_in_flight_and_ctrl_c_leaves_nothing():
    before = set(Path("/dev/shm").iterdir())
    with cluster(workers=1, shards=2, device="cpu") as one:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor() as pool:
            (stream,) = tell_stories(client, pool, 1, tokens=60)
            one.stop(signal.SIGTERM)
            count, _, error = stream.result(10)
        assert error == "" and count >= 60
        assert one.pids() == [] and set(Path("/dev/shm").iterdir()) == before
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{one.url}/health")


def _line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
