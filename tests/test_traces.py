"""One trace of a request, from its door through scheduler and worker to each shard, as a collector gets it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import nats
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.cluster import Cluster, cluster, free_ports
from common.messages import Generate, Message, Sampling, Watch
from common.nats_bus import NatsBus
from common.settings import Settings
from common.tracing import NOT_RECORDED, Traces, current, open_traces
from services.expert_shard.metrics import ShardCounts
from services.expert_shard.watch import MOST, Watches
from services.gateway import door
from services.gpu_worker.engine import RequestTimes
from services.gpu_worker.spans import RequestSpans
from tests.api_front import Front, make_front
from tests.conftest import REPO
from tests.outside import GENERATE, Inbox, service

OURS = 0.005  # seconds that clocks read in two places of one machine may differ by
HOP = 0.25  # what a message may take on two busy cores
ALL = [
    "POST /v1/completions",
    "assign",
    "choose worker",
    "decode",
    "experts",
    "experts",
    "generate",
    "prefill",
    "queue",
]


class Got(NamedTuple):
    trace: str
    id: str
    parent: str
    name: str
    service: str
    actor: str
    began: float
    ended: float
    attributes: dict[str, Any]
    status: int  # 0 unset, 2 error
    state: str


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    found = getattr(any_value, kind)
    return [value(one) for one in found.values] if kind == "array_value" else found


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: value(pair.value) for pair in pairs}


class Collector:
    """OTLP over HTTP, as far as a client sees it."""

    def __init__(self) -> None:
        self.spans: list[Got] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/traces":
                    collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, message: ExportTraceServiceRequest) -> None:
        for resource_spans in message.resource_spans:
            resource = attributes(resource_spans.resource.attributes)
            service, actor = resource["service.name"], resource["service.instance.id"]
            self.spans += [
                Got(
                    span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name, service, actor,
                    span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9, attributes(span.attributes),
                    span.status.code, span.trace_state,
                )
                for scope_spans in resource_spans.scope_spans
                for span in scope_spans.spans
            ]  # fmt: skip

    def of(self, trace: str) -> list[Got]:
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.name)

    def names(self, trace: str) -> list[str]:
        return [span.name for span in self.of(trace)]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[Cluster]:
    with cluster(shards=2, device="cpu", traces=collector.url) as one:
        yield one


_traces = iter(range(0xABC000, 0xABCFFF))


def new_trace() -> str:
    return f"{next(_traces):032x}"


STATE = "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"


def sent(traceparent: str, tracestate: str = "") -> Callable[[str], str]:
    """What came with a request, by name."""
    return {"traceparent": traceparent, "tracestate": tracestate}.__getitem__


def ask(running: Cluster, traceparent: str = "", key: str = "none", **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": True} | fields
    headers = {"authorization": f"Bearer {key}"}
    headers |= {"traceparent": traceparent, "tracestate": STATE} if traceparent else {}
    return httpx.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=60)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def one_named(spans: list[Got], name: str) -> Got:
    (found,) = [span for span in spans if span.name == name]
    return found


def assert_within(child: Got, parent: Got, slack: float = OURS) -> None:
    assert child.parent == parent.id
    assert parent.began - slack <= child.began <= child.ended <= parent.ended + slack, (child, parent)


@pytest.mark.cluster
def test_one_trace_from_the_door_to_each_shard(traced: Cluster, collector: Collector):
    trace = new_trace()
    answer = ask(traced, f"00-{trace}-00000000000000aa-01").json()
    until(lambda: len(collector.of(trace)) >= len(ALL))
    spans = collector.of(trace)
    assert [span.name for span in spans] == ALL
    door, assign, choose, generate = (
        one_named(spans, name) for name in [ALL[0], "assign", "choose worker", "generate"]
    )
    experts = [span for span in spans if span.name == "experts"]

    assert door.parent == "00000000000000aa"
    assert [s.service for s in (door, assign, choose, generate, *experts)] == [
        "moecule-gateway", "moecule-gateway", "moecule-scheduler", "moecule-worker", "moecule-shard", "moecule-shard",
    ]  # fmt: skip
    assert_within(assign, door)
    assert_within(choose, assign)
    assert_within(generate, door)
    for span in experts:
        assert_within(span, generate, HOP)
    phases = [one_named(spans, name) for name in ("queue", "prefill", "decode")]
    for span in phases:
        assert_within(span, generate)
    assert sum(span.ended - span.began for span in phases) == pytest.approx(generate.ended - generate.began, abs=OURS)

    usage = answer["usage"]
    tokens = {"gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": 20}
    end = {"gen_ai.response.finish_reasons": ["length"]}
    assert door.attributes == {"gen_ai.request.model": "tiny"} | tokens | end
    assert generate.attributes.pop("moecule.map_version") >= 1
    assert generate.attributes == {"moecule.preemptions": 0, "moecule.cached_tokens": 0} | tokens | end
    assert choose.attributes == {"moecule.worker": generate.actor, "moecule.workers": 1}
    assert {(span.status, span.state) for span in spans} == {(0, STATE)}


@pytest.mark.cluster
def test_each_shard_tells_what_it_did_itself(traced: Cluster, collector: Collector):
    trace = new_trace()
    ask(traced, f"00-{trace}-00000000000000aa-01", max_tokens=50)
    until(lambda: len(collector.of(trace)) >= len(ALL))
    experts = [span for span in collector.of(trace) if span.name == "experts"]
    assert len({span.actor for span in experts}) == 2
    for span in experts:
        # 4 MoE layers, and of 4 experts one is nearly always here; the first step may come before the word of it.
        assert 100 < span.attributes["moecule.rows"] <= 4 * (50 + 20)
        assert 0 < span.attributes["moecule.busy_seconds"] <= span.ended - span.began
        assert span.attributes["moecule.partitions"] == 8


@pytest.mark.cluster
def test_a_request_over_nats_is_traced_as_well(traced: Cluster, collector: Collector):
    trace = new_trace()
    body = json.dumps({"model": "tiny", "prompt": "Once upon a time", "max_tokens": 5}).encode()

    async def over_nats() -> None:
        async with await nats.connect(traced.env["MOECULE_NATS_URL"]) as client:
            answers = await client.subscribe(inbox := client.new_inbox())
            headers = {"traceparent": f"00-{trace}-00000000000000aa-01"}
            await client.publish("moecule.v1.generate", body, reply=inbox, headers=headers)
            async for message in answers.messages:
                if json.loads(message.data)["type"] == "end":
                    return

    asyncio.run(over_nats())
    until(lambda: len(collector.of(trace)) >= len(ALL))
    spans = collector.of(trace)
    assert [span.name for span in spans] == sorted(["moecule.v1.generate", *ALL[1:]])
    door = one_named(spans, "moecule.v1.generate")
    assert door.parent == "00000000000000aa" and one_named(spans, "generate").parent == door.id


@pytest.mark.cluster
def test_what_the_caller_does_not_sample_is_not_recorded(traced: Cluster, collector: Collector):
    unwanted, wanted = new_trace(), new_trace()
    assert ask(traced, f"00-{unwanted}-00000000000000aa-00").status_code == 200
    ask(traced, f"00-{wanted}-00000000000000aa-01")
    until(lambda: collector.names(wanted) == ALL)
    time.sleep(1.0)  # each actor sends on its own
    assert collector.of(unwanted) == []


@pytest.mark.cluster
@pytest.mark.parametrize(
    "traceparent",
    ["", "00-abc-def-01", f"ff-{1:032x}-{1:016x}-01", f"00-{0:032x}-{1:016x}-01", "\xff", "00-" + "g" * 5000],
)
def test_a_malformed_traceparent_is_ignored_and_a_new_trace_begins(
    traced: Cluster, collector: Collector, traceparent: str
):
    before = len(collector.spans)
    headers = [(b"traceparent", traceparent.encode("latin-1"))] if traceparent else []
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 5}
    assert httpx.post(f"{traced.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    until(lambda: len(collector.spans) >= before + len(ALL))
    (trace,) = {span.trace for span in collector.spans[before:]}
    assert collector.names(trace) == ALL and one_named(collector.of(trace), ALL[0]).parent == ""


@pytest.mark.cluster
def test_a_refused_request_says_so_and_ends_there(traced: Cluster, collector: Collector):
    trace = new_trace()
    assert ask(traced, f"00-{trace}-00000000000000aa-01", temperature=-1).status_code == 400
    until(lambda: bool(collector.of(trace)))
    (span,) = collector.of(trace)
    assert (span.attributes["error.type"], span.status) == ("invalid_request", 0), (
        "what a client did wrong is no failure"
    )


@pytest.mark.cluster
def test_a_request_whose_client_leaves_ends_everywhere(traced: Cluster, collector: Collector):
    trace = new_trace()
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    headers = {"traceparent": f"00-{trace}-00000000000000aa-01"}
    with httpx.stream("POST", f"{traced.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_bytes())
    until(lambda: len(collector.of(trace)) >= len(ALL))
    spans = collector.of(trace)
    assert [span.name for span in spans] == ALL
    assert one_named(spans, ALL[0]).attributes["error.type"] == "request_cancelled"
    generate = one_named(spans, "generate")
    assert generate.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert 0 < generate.attributes["gen_ai.usage.output_tokens"] < 3000 and generate.status == 0


@pytest.mark.cluster
def test_what_was_recorded_last_is_sent_before_the_end(collector: Collector, tmp_path: Path):
    """Over the bus link, and with keys."""
    keys, trace = tmp_path / "keys", new_trace()
    keys.write_text("alice mk-0123456789abcdef\n")
    keys.chmod(0o600)
    with cluster(shards=2, device="cpu", traces=collector.url, link="bus", api_keys=keys) as running:
        ask(running, f"00-{trace}-00000000000000aa-01", key="mk-0123456789abcdef")
        running.stop()
    assert collector.names(trace) == ALL
    assert one_named(collector.of(trace), ALL[0]).attributes["moecule.key"] == "alice"


@pytest.mark.cluster
def test_a_collector_that_is_away_costs_no_request_and_no_time(collector: Collector):
    (port,) = free_ports(1)
    with cluster(shards=2, device="cpu", traces=f"http://127.0.0.1:{port}") as running:
        for _ in range(20):
            began = time.monotonic()
            assert ask(running).status_code == 200
            assert time.monotonic() - began < 5
        until(lambda: "traces are lost" in running.output())
        began = time.monotonic()
        running.stop()
        assert time.monotonic() - began < 4
        assert running.output().count("traces are lost") <= 5, "once an actor"
        assert "Traceback" not in running.output()


@pytest.mark.cluster
def test_without_the_setting_nothing_is_sent(collector: Collector, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    trace = new_trace()
    with cluster(shards=2, device="cpu") as running:
        assert ask(running, f"00-{trace}-00000000000000aa-01").status_code == 200
        running.stop()
    assert collector.of(trace) == []


# ---- without a cluster


@pytest.fixture
async def traces(collector: Collector) -> AsyncIterator[Traces]:
    one = open_traces(Settings(traces=collector.url), "test", "me", structlog.get_logger())
    yield one
    await one.close()


def generate_in(trace: str) -> Generate:
    parent = f"00-{trace}-00000000000000aa-01"
    return Generate(request_id="r", gateway_id="g", prompt=(1,), sampling=Sampling(max_tokens=1), traceparent=parent)


async def test_what_a_request_that_was_not_sampled_does_is_not_recorded(traces: Traces, collector: Collector):
    trace = new_trace()
    with traces.request("door", sent(f"00-{trace}-00000000000000aa-00")) as span:
        assert span is current() is NOT_RECORDED
        with current().child("assign") as child:
            assert child.traceparent == ""
    assert traces.begin("generate", "") is NOT_RECORDED, "who sent no span does not want one"
    await traces.close()
    assert collector.of(trace) == []


async def test_a_span_is_that_of_its_block_and_of_the_tasks_made_there(traces: Traces, collector: Collector):
    trace = new_trace()

    async def in_a_task() -> str:
        return current().traceparent

    with traces.request("door", sent(f"00-{trace}-00000000000000aa-01")) as door:
        assert await asyncio.create_task(in_a_task()) == door.traceparent
        with pytest.raises(ZeroDivisionError), current().child("inner") as inner:
            assert current() is inner
            _ = 1 / 0
        assert current() is door
    assert current() is NOT_RECORDED
    until(lambda: len(collector.of(trace)) == 2)
    assert [(span.name, span.status, span.attributes) for span in collector.of(trace)] == [
        ("door", 0, {}),
        ("inner", 2, {"error.type": "ZeroDivisionError"}),
    ]


LONG = f"a={'x' * 253},b={'y' * 254}"  # 512 characters


@pytest.mark.parametrize(
    ("tracestate", "kept"),
    [(STATE, STATE), ("a=1 , b=2", "a=1,b=2"), (LONG, LONG), (f"{LONG}y", ""), ("", ""), ("\xff", ""), ("no list", "")],
    ids=["two", "spaces", "long", "too long", "none", "no text", "malformed"],
)
async def test_the_callers_state_is_on_every_span(traces: Traces, collector: Collector, tracestate: str, kept: str):
    trace = new_trace()
    with traces.request("door", sent(f"00-{trace}-00000000000000aa-01", tracestate)) as door:
        with door.child("assign"):
            pass
        told = door.traceparent  # to the worker, which tells the shards
        worker = traces.begin("generate", told)
        shard = traces.begin("experts", worker.traceparent)
        worker.phase("queue", time.perf_counter(), time.perf_counter())
        shard.end()
        worker.end()
    until(lambda: len(collector.of(trace)) == 5)
    assert {span.state for span in collector.of(trace)} == {kept}
    assert one_named(collector.of(trace), "experts").parent == one_named(collector.of(trace), "generate").id


def test_without_traces_no_header_is_looked_up():
    with Traces().request("door", {}.__getitem__) as span:
        assert span is NOT_RECORDED


# ---- what is refused at a door

KEY = "mk-0123456789abcdef"


@pytest.fixture
async def front(nats_url: str, collector: Collector, tmp_path: Path) -> AsyncIterator[Front]:
    keys = tmp_path / "keys"
    keys.write_text(f"alice {KEY}\n")
    keys.chmod(0o600)
    settings = Settings(port=0, drain_seconds=0.3, api_keys=str(keys), traces=collector.url)
    async for one in make_front(settings, new_bus=lambda: NatsBus(nats_url, "test")):
        yield one


REFUSALS = {
    "invalid_api_key": ({"authorization": "Bearer mk-nobody-0123456789"}, ""),
    "draining": ({}, "the gateway is leaving"),
    "invalid_request": ({"x-request-deadline-ms": "soon"}, ""),
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("code", REFUSALS)
async def test_a_request_that_is_refused_at_once_has_a_span(front: Front, collector: Collector, path: str, code: str):
    trace, (headers, front.gateway.generator.refusal) = new_trace(), REFUSALS[code]
    headers = {"authorization": f"Bearer {KEY}", "traceparent": f"00-{trace}-00000000000000aa-01"} | headers
    answer = await front.http.post(path, json={"model": "tiny"}, headers=headers)
    assert answer.json()["error"]["code"] == code
    until(lambda: bool(collector.of(trace)))
    (span,) = collector.of(trace)
    assert (span.name, span.parent, span.attributes) == (f"POST {path}", "00000000000000aa", {"error.type": code})
    assert span.status == (2 if code == "draining" else 0)


@pytest.mark.parametrize(
    ("code", "key", "refusal", "most"),
    [("invalid_api_key", "nobody", "", 9), ("draining", KEY, "the gateway is leaving", 9), ("overloaded", KEY, "", 0)],
)
async def test_so_has_one_over_nats(
    front: Front, nats_url: str, collector: Collector, monkeypatch: pytest.MonkeyPatch,
    code: str, key: str, refusal: str, most: int,
):  # fmt: skip
    monkeypatch.setattr(door, "MOST_CALLERS", most)
    trace, front.gateway.generator.refusal = new_trace(), refusal
    headers = {"Authorization": f"Bearer {key}", "Traceparent": f"00-{trace}-00000000000000aa-01", "tracestate": STATE}
    async with service(nats_url) as other:
        inbox = Inbox(other.client.new_inbox())
        await other.client.subscribe(inbox.subject, cb=inbox.take)
        await other.client.publish(GENERATE, b"{}", reply=inbox.subject, headers=headers)
        assert (await inbox.error())["code"] == code
    until(lambda: bool(collector.of(trace)))
    (span,) = collector.of(trace)
    assert (span.name, span.parent, span.state) == (GENERATE, "00000000000000aa", STATE)
    assert span.attributes == {"error.type": code}


async def test_what_is_no_request_to_generate_has_none(front: Front, collector: Collector):
    unwanted, wanted = new_trace(), new_trace()

    async def send(method: str, path: str, trace: str) -> int:
        headers = {"authorization": f"Bearer {KEY}", "traceparent": f"00-{trace}-00000000000000aa-01"}
        body = {"model": "tiny", "prompt": "x"}
        return (await front.http.request(method, path, json=body, headers=headers)).status_code

    for method, path, status in (
        ("PUT", "/v1/completions", 405),
        ("POST", "/v1/nothing", 404),
        ("POST", "/tokenize", 200),
    ):
        assert await send(method, path, unwanted) == status
    assert await send("POST", "/v1/completions", wanted) == 200
    until(lambda: "POST /v1/completions" in collector.names(wanted))
    assert collector.of(unwanted) == []


async def test_a_share_of_the_requests_that_come_without_a_span(collector: Collector):
    some = open_traces(Settings(traces=collector.url, traces_ratio=0.25), "test", "me", structlog.get_logger())
    recorded = 0
    for _ in range(400):
        with some.request("door", sent("")) as span:
            recorded += bool(span.traceparent)
    assert 50 < recorded < 150
    wanted = f"00-{new_trace()}-00000000000000aa-01"
    with some.request("door", sent(wanted)) as span:
        assert span.traceparent
    await some.close()


async def test_shards_hear_last_that_a_request_has_ended_even_if_it_ends_while_they_are_told(traces: Traces):
    told: list[tuple[str, bool]] = []
    times = RequestTimes("r", *(time.perf_counter() for _ in range(4)), preemptions=0)

    async def publish(to: str, message: Message) -> None:
        assert isinstance(message, Watch)
        told.append((to.split(".")[-2], message.ends))
        if len(told) == 1:
            await spans.end(times, None)

    spans = RequestSpans(traces, publish)
    await spans.begin(generate_in(new_trace()), ("a", "b"), 1)
    assert "r" not in spans
    assert {shard: ends for shard, ends in told} == {"a": True, "b": True}


async def test_a_request_that_ends_in_the_queue_has_no_other_phase(traces: Traces, collector: Collector):
    async def publish(_: str, message: Message) -> None: ...

    trace, now = new_trace(), time.perf_counter()
    spans = RequestSpans(traces, publish)
    await spans.begin(generate_in(trace), (), 1)
    await spans.end(RequestTimes("r", now - 2.0, 0.0, 0.0, now, 0), None)
    until(lambda: len(collector.of(trace)) == 2)
    (queue,) = [span for span in collector.of(trace) if span.name != "generate"]
    assert queue.name == "queue" and queue.ended - queue.began == pytest.approx(2.0, abs=OURS)


async def test_a_shard_forgets_the_watches_of_workers_that_died(traces: Traces, collector: Collector):
    rows = 0
    watches = Watches(traces, lambda: ShardCounts(1, 1, rows, 0.0, (), 0, 0))
    trace = new_trace()
    parents = [f"00-{trace}-{i:016x}-01" for i in range(1, MOST + 2)]
    for parent in parents:
        watches.take(Watch(traceparent=parent))
    rows = 7
    for parent in (parents[0], parents[-1], parents[-1]):
        watches.take(Watch(traceparent=parent, ends=True))
    until(lambda: bool(collector.of(trace)))
    await traces.close()
    (span,) = collector.of(trace)
    assert span.parent == f"{MOST + 1:016x}"
    assert span.attributes == {"moecule.rows": 7, "moecule.partitions": 1}, "a GPU's seconds are not known"


async def test_a_shard_that_leaves_ends_what_it_watches(traces: Traces, collector: Collector):
    """Worker and shard are stopped together: the worker's last word may come when nobody listens any more."""
    rows, trace = 0, new_trace()
    watches = Watches(traces, lambda: ShardCounts(1, 1, rows, 0.0, (), 0, 0))
    for i in (1, 2):
        watches.take(Watch(traceparent=f"00-{trace}-{i:016x}-01"))
    rows = 3
    watches.close()
    watches.take(Watch(traceparent=f"00-{trace}-{1:016x}-01", ends=True))
    await traces.close()
    spans = collector.of(trace)
    assert sorted(span.parent for span in spans) == [f"{1:016x}", f"{2:016x}"]
    assert [span.attributes["moecule.rows"] for span in spans] == [3, 3]


MAKE_ALL = """
import sys
from common.memory_bus import MemoryBroker, MemoryBus
from common.settings import Settings
from services.expert_shard.actor import ExpertShard
from services.gateway.actor import Gateway
from services.gpu_worker.actor import Worker
from services.scheduler.actor import Scheduler
actors = [kind(MemoryBus(MemoryBroker()), Settings()) for kind in (ExpertShard, Gateway, Worker, Scheduler)]
print([name for name in sys.modules if name.partition(".")[0] == "opentelemetry"])
"""


def test_without_the_setting_opentelemetry_is_not_imported():
    done = subprocess.run([sys.executable, "-c", MAKE_ALL], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_without_the_package_the_start_ends_and_says_what_to_install():
    code = (
        "import runpy, sys; sys.modules['opentelemetry'] = None; sys.argv[1:] = ['--check']; "
        "runpy.run_module('common.supervisor', run_name='__main__')"
    )
    env = {"PATH": "", "MOECULE_TRACES": "http://127.0.0.1:4318"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert "MOECULE_TRACES needs OpenTelemetry, which is not installed: pip install -e '.[traces]'" in done.stderr
