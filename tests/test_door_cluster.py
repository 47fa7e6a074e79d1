"""The NATS door of a real cluster, used by services that are processes of their own and know only the document."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster import ROOT, Cluster, cluster
from tests.test_cluster import metric, wait_until

pytestmark = pytest.mark.cluster

EXAMPLE = ROOT / "docs" / "ask_over_nats.py"


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with cluster(workers=1, shards=1, device="cpu") as one:
        yield one


@pytest.fixture(scope="module")
def document(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asyncapi") / "asyncapi.json"
    path.write_bytes(urllib.request.urlopen(f"{running.url}/asyncapi.json", timeout=5).read())
    return path


def command(running: Cluster, document: Path, job: str) -> list[str]:
    url = running.env["MOECULE_NATS_URL"]
    return [sys.executable, "-I", str(ROOT / "tests" / "asyncapi_client.py"), url, str(document), job]


def done(running: Cluster, document: Path, job: str) -> list[dict[str, Any]]:
    """What the service printed; run where nothing of ours can be imported."""
    ran = subprocess.run(
        command(running, document, job), cwd=document.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@contextlib.contextmanager
def streaming(running: Cluster, document: Path) -> Iterator[subprocess.Popen[str]]:
    """A service that has a stream under way."""
    client = subprocess.Popen(
        command(running, document, "stream"), cwd=document.parent, stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        while json.loads(client.stdout.readline())["type"] != "tokens":
            pass
        yield client
    finally:
        client.kill()
        client.wait()
        assert client.stdout is not None
        client.stdout.close()


def test_it_generates(running: Cluster, document: Path):
    answers = {one["name"]: one for one in done(running, document, "generate")}
    assert set(answers) == {"TextRequest", "TokensRequest", "MessagesRequest"}
    assert all(one["last"] == "Ended" and one["whole"] and one["text"] for one in answers.values())
    assert "132" in answers["MessagesRequest"]["text"]


def test_it_cancels(running: Cluster, document: Path):
    assert done(running, document, "cancel") == [
        {"cancelled": "Cancelled"},
        {"code": "request_cancelled"},
        {"again": "not_found", "told": "Refused"},
    ]
    wait_until(lambda: metric(running, "moecule_kv_pages_used") == 0, 2, "the pages are not free")


def test_it_gets_errors(running: Cluster, document: Path):
    invalid = "invalid_request"
    expected = [
        (invalid, None),
        (invalid, "model"),
        ("model_not_found", "model"),
        (invalid, "temperature"),
        (invalid, "tokens"),
        ("context_length_exceeded", "tokens"),
        (invalid, "messages[0].content"),
    ]
    answers = done(running, document, "errors")
    assert [(one["code"], one["param"]) for one in answers] == expected
    assert all(one["same"] for one in answers), "the headers say what the answer says"


def test_it_asks_for_the_models(running: Cluster, document: Path):
    assert done(running, document, "models") == [{"models": ["tiny"], "told": "ModelList"}]


def test_a_killed_service_frees_the_workers_pages_within_2_s(running: Cluster, document: Path):
    with streaming(running, document) as client:
        assert metric(running, "moecule_kv_pages_used") > 0
        client.send_signal(signal.SIGKILL)
        client.wait()
        killed = time.monotonic()
        wait_until(lambda: metric(running, "moecule_kv_pages_used") == 0, 2, "the pages are not free")
        print(f"pages free {time.monotonic() - killed:.3f} s after the kill")
    assert metric(running, "moecule_num_requests_running") == 0
    assert running.is_ready()


def test_a_stopped_service_is_not_a_dead_one(running: Cluster, document: Path):
    """It reads nothing for a while: NATS keeps its answers."""
    with streaming(running, document) as client:
        client.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        assert metric(running, "moecule_num_requests_running") == 1
        client.send_signal(signal.SIGCONT)
    wait_until(lambda: metric(running, "moecule_kv_pages_used") == 0, 2, "the pages are not free")


def test_the_example_of_the_readme(running: Cluster):
    text = EXAMPLE.read_text()
    assert f"```python\n{text}```" in (ROOT / "README.md").read_text(), "README and example are one text"
    code = text.replace("nats://127.0.0.1:4222", running.env["MOECULE_NATS_URL"])
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "132" in ran.stdout and "7 + 5" in ran.stdout
