"""benchmarks.serve against a real gateway, whose worker is a stand-in."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks import serve, shapes
from benchmarks.beside import longest_output
from common.errors import Overloaded
from common.messages import Generate
from common.settings import Settings
from tests.api_front import Front, make_front
from tests.stub_worker import StubWorker

TOKEN = 331
TOKEN_SECONDS = 0.002


class SteadyWorker(StubWorker):
    """A token of each request every so often, as many as it asks for."""

    async def _send_all(self, request: Generate) -> None:
        for i in range(request.sampling.max_tokens):
            await asyncio.sleep(TOKEN_SECONDS)
            if request.request_id in self.aborted:
                return
            await self._send(request, i, TOKEN, last=i + 1 == request.sampling.max_tokens)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3), SteadyWorker):
        one.worker.script = lambda request: [TOKEN] * (request.sampling.max_tokens + 1)
        yield one


async def run(front: Front, *arguments: object) -> bool:
    options = serve.read_options(["--url", f"http://127.0.0.1:{front.gateway.port}/v1/", *map(str, arguments)])
    return await serve.run(options, "tiny")


SHORT = ("--input", 40, "--output", 10, "--prompts-per-stream", 3, "--warmups-per-stream", 1)


async def test_a_sweep(front: Front, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", tmp_path / "run.json", "--plot", tmp_path / "run.svg")
    assert await run(front, *SHORT, "--concurrency", "1,2", "--cards", 2, *files)
    probe, *sent = front.worker.admitted
    counted = [sent[1:4], sent[6:12]]  # after the warm-up of each
    assert len(sent) == 12 and len(probe.prompt) == 16
    for one in sent:
        assert 32 <= len(one.prompt) <= 40 and 8 <= one.sampling.max_tokens <= 10
        assert (one.sampling.temperature, one.sampling.ignore_eos) == (0.0, True)
        assert min(one.prompt) >= 16 and max(one.prompt) < 2000
    assert len({one.salt for one in sent} - {""}) == 12, "no two share a cache"
    assert len({one.prompt for one in sent}) == 12

    report = json.loads((tmp_path / "run.json").read_text())
    for row, requests, streams in zip(report["rows"], counted, (1, 2), strict=True):
        assert (row["concurrency"], row["requests"], row["failed"]) == (streams, 3 * streams, 0)
        assert row["input_tokens"] == sum(len(one.prompt) for one in requests)
        assert row["output_tokens"] == sum(one.sampling.max_tokens for one in requests)
        total = row["input_tokens"] + row["output_tokens"]
        assert row["tokens_per_second_per_card"] == pytest.approx(total / row["seconds"] / 2)
        assert row["interactivity"] == pytest.approx(1000 / row["tpot_ms"]["median"])
        assert 2.0 < row["tpot_ms"]["median"] < 1e3 * row["seconds"], "a token each 2 ms at most"
        assert row["ttft_ms"]["median"] > 2.0 and row["itl_ms"]["p99"] >= row["itl_ms"]["median"]
        assert row["client_cpu"] > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert [line.split(" | ")[:3] for line in table] == [["| 1", "3", "0"], ["| 2", "6", "0"]]
    texts = [element.text for element in ElementTree.parse(tmp_path / "run.svg").iter() if element.text]
    assert {"c1", "c2", "tiny", "tok/s a user (1000 / median TPOT in ms)"} <= set(texts)


async def test_a_prefix_cache_is_told_and_runs_share_a_plot(
    front: Front, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, drawn = tmp_path / "first.json", tmp_path / "both.svg"
    assert await run(front, *SHORT, "--concurrency", 1, "--json", first, "--name", "before")
    front.worker.cached_tokens = 7
    assert "prefix cache" not in capsys.readouterr().out
    assert await run(front, *SHORT, "--concurrency", 2, "--plot", drawn, "--plot-with", first, "--name", "after")
    assert "2 streams: 42 tokens of prompts came from a prefix cache" in capsys.readouterr().out
    texts = {element.text for element in ElementTree.parse(drawn).iter()}
    assert {"before", "after", "c1", "c2"} <= texts


async def test_a_point_that_may_take_so_long(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(front, *SHORT, "--concurrency", 2, "--seconds", 0.001)
    out = capsys.readouterr().out
    assert "| 2 | 2 | 0 |" in out, "one of each stream, and they are awaited"
    assert "3 requests a stream after 1 to warm up, none begun after 0.001 s (InferenceX: 10 after 2" in out


async def test_what_is_not_shortened_is_not_said_to_be(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(front, "--input", 4, "--output", 2, "--concurrency", 1)
    assert "10 requests a stream after 2 to warm up, temperature" in capsys.readouterr().out


async def test_a_model_of_which_there_is_only_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "cut", shapes.V2_LITE | {"vocab_size": 400})
    folder = str(shapes.write_model("cut", 2, tmp_path))
    settings = Settings(port=0, drain_seconds=0.3, model=folder, model_name="tiny", weights="random")
    async for front in make_front(settings, SteadyWorker):
        front.worker.script = lambda request: [TOKEN] * (request.sampling.max_tokens + 1)
        assert await run(front, *SHORT, "--concurrency", 2, "--vocabulary", 400)


def test_a_server_that_lives_as_long_as_the_run(tmp_path: Path) -> None:
    for path in ("health", "ready"):
        (tmp_path / path).touch()
    server = f"{sys.executable} -m http.server {{port}} --bind 127.0.0.1 --directory {tmp_path}"
    options = serve.read_options(["--server", server])
    with serve.serving(options):
        assert options.url.endswith("/v1")
        health = options.url.removesuffix("v1") + "health"
        urllib.request.urlopen(health).close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(health)


async def test_as_many_at_a_time_as_asked(front: Front) -> None:
    running, most = 0, 0
    send_all = front.worker._send_all

    async def counting(request: Generate) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await send_all(request)
        running -= 1

    front.worker._send_all = counting  # type: ignore[method-assign]
    assert await run(front, *SHORT, "--concurrency", 3)
    assert most == 3


async def test_requests_that_fail_are_counted_and_told(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    send_all = front.worker._send_all

    async def failing(request: Generate) -> None:
        if len(front.worker.admitted) in (4, 6):
            await front.worker._send(request, 0, TOKEN, last=True)
        else:
            await send_all(request)

    front.worker._send_all = failing  # type: ignore[method-assign]
    assert not await run(front, *SHORT, "--concurrency", 1, "--prompts-per-stream", 6)
    out = capsys.readouterr().out
    assert "| 1 | 6 | 2 |" in out and "1 streams FAILED: 2 x 1 tokens instead of " in out


async def test_a_server_that_answers_nothing(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    front.scheduler.refusal = Overloaded("full")
    assert not await run(front, *SHORT)
    assert "FAILED: HTTP 429: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "nothing answers at URL: start it with `make serve`, or add --server"),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "URL/models answers HTTP 401: check --url"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "URL/models names no model: check --url, or name one"),
        (b"+PONG\r\n\r\n", "URL/models names no model: check --url, or name one"),
    ],
)
def test_an_endpoint_that_names_no_model(answer: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

        def respond() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(answer or b"")

        if answer is None:
            listener.close()
        else:
            threading.Thread(target=respond, daemon=True).start()
        monkeypatch.setattr(sys, "argv", ["serve", "--url", url])
        with pytest.raises(SystemExit, match=re.escape(f"FAILED: {says.replace('URL', url)}")):
            serve.main()


async def test_streams_beside_prompts(front: Front, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--beside",
        3,
        "--beside-output",
        3000,
        "--beside-input",
        20,
        "--input",
        200,
        "--seconds",
        0.5,
        "--arrivals",
        5,
    )
    assert await run(front, *arguments, "--json", tmp_path / "run.json")
    long = [one for one in front.worker.admitted if len(one.prompt) >= 160]
    assert [one.sampling.max_tokens for one in long] == [1] * 5
    report = json.loads((tmp_path / "run.json").read_text())
    assert (report["streams"], report["answered"], report["errors"]) == (3, 5, [])
    assert report["alone"]["seconds"] == pytest.approx(0.5, abs=0.3)
    for span in ("alone", "beside"):
        assert 1.0 < report[span]["itl_ms"]["median"] <= report[span]["itl_ms"]["p99"]
        assert report[span]["longest_pause_ms"] >= report[span]["itl_ms"]["p99"]
        assert 0 < report[span]["tokens_per_second"] < 1 / TOKEN_SECONDS
    assert "| beside prompts of 160 to 200 tokens | " in capsys.readouterr().out


async def test_prompts_at_a_rate(front: Front, tmp_path: Path) -> None:
    arguments = (
        "--beside",
        1,
        "--beside-output",
        3000,
        "--input",
        20,
        "--seconds",
        0.5,
        "--arrivals",
        50,
        "--rate",
        20,
    )
    assert await run(front, *arguments, "--json", tmp_path / "run.json")
    assert 5 <= json.loads((tmp_path / "run.json").read_text())["answered"] <= 12


async def test_an_itl_above_the_bound(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--beside", 1, "--beside-output", 3000, "--input", 20, "--seconds", 0.2, "--arrivals", 2)
    assert not await run(front, *arguments, "--bound", 0.01)
    assert "bound 0.01 ms: FAIL" in capsys.readouterr().out


async def test_running_streams_are_as_long_as_the_context_allows(front: Front) -> None:
    options = serve.read_options(["--url", f"http://127.0.0.1:{front.gateway.port}/v1", "--beside", "1"])
    assert await asyncio.to_thread(serve.model_of, options) == ("tiny", 4096)
    options.model = "another"
    assert await asyncio.to_thread(serve.model_of, options) == ("another", 0)
    assert [longest_output(context, 128) for context in (0, 4096, 9344, 100)] == [8192, 3968, 8192, 1]


async def test_a_refused_prompt_is_the_one_reason(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--beside", 1, "--beside-output", 3000, "--input", 9000, "--seconds", 0.2, "--arrivals", 1)
    assert not await run(front, *arguments)
    out = capsys.readouterr().out
    assert "HTTP 400" in out and "raise --seconds" not in out


async def test_streams_that_do_not_last(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    assert not await run(front, "--beside", 2, "--input", 20, "--beside-output", 2)
    assert "2 x all its outputs ended before the spans did" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "4,-1", "x", ""])
def test_numbers_of_streams_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.read_options(["--concurrency", text])
    assert "--concurrency" in capsys.readouterr().err
