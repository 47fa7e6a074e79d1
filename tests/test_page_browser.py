"""The page in headless Chromium, against a real cluster: two workers and two shards, which are killed in turn.

Where there is no browser these are skipped; `make browser` installs playwright and runs them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.cluster import Cluster, cluster
from tests.browser import browser, why_not

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = [pytest.mark.cluster, pytest.mark.browser, pytest.mark.skipif(bool(why_not()), reason=why_not())]

QUESTION = "What is 47 + 85?"
BACK_MS = 20_000  # interpreter, torch and models/tiny on two busy cores
SHOWN_MS = 2_000


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with cluster(workers=2, shards=2, device="cpu") as one:
        yield one


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as one:
        yield one


@pytest.fixture
def page(running: Cluster, chromium: Browser) -> Iterator[Page]:
    """Open, and live. At the end: it said nothing on the console, and asked nobody but the gateway."""
    running.wait_ready(30)
    one = chromium.new_page()
    said: list[str] = []
    one.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    one.on("pageerror", lambda error: said.append(str(error)))
    one.on("request", lambda request: said.append(request.url) if not request.url.startswith(running.url) else None)
    one.goto(f"{running.url}/")
    state(one, "Ready")
    yield one
    one.close()
    assert [text for text in said if "status of" not in text and "ERR_FAILED" not in text] == []


def until(page: Page, condition: str, timeout: float = 10_000, arg: Any = None) -> None:
    """The policy forbids eval, so that playwright's own wait_for_function with a string does not work."""
    deadline = time.monotonic() + timeout / 1000
    while not page.evaluate(condition, arg):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def state(page: Page, text: str) -> None:
    page.locator("#state", has_text=text).wait_for(timeout=10_000)


def card(page: Page, actor: str) -> Any:
    return page.locator("article.card").filter(has=page.get_by_role("heading", name=actor, exact=True))


def send(page: Page, text: str = QUESTION) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def endless(page: Page) -> None:
    """The next question's answer does not end by itself."""

    def longer(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}") | {"ignore_eos": True, "max_tokens": 3000}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", longer, times=1)


def metric(running: Cluster, name: str) -> float:
    text = urllib.request.urlopen(f"{running.url}/metrics", timeout=5).read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


# ---- the chat


def test_an_answer_streams_and_its_reasoning_is_folded(page: Page) -> None:
    page.evaluate("""() => {
        window.grew = { thought: new Set(), text: new Set() };
        const length = part => document.querySelector(part)?.textContent.length || 0;
        new MutationObserver(() => {
            grew.thought.add(length(".reasoning div"));
            grew.text.add(length(".theirs .text"));
        }).observe(document.querySelector("#talk"), { childList: true, subtree: true });
    }""")
    send(page)
    page.get_by_text("47 + 85 = 132", exact=True).wait_for()
    page.get_by_role("button", name="Send").wait_for()
    assert page.evaluate("grew.thought.size > 10 && grew.text.size > 2"), "both came bit by bit"
    fold = page.locator("details.reasoning")
    assert "7 + 5" in fold.locator("div").text_content() and not fold.locator("div").is_visible()
    assert "think>" not in page.locator(".theirs").text_content()
    fold.locator("summary").click()
    assert fold.locator("div").is_visible()
    assert "tokens/s" in page.locator(".facts").text_content()


def test_stop_stops_the_worker_too(page: Page, running: Cluster) -> None:
    endless(page)
    send(page)
    until(page, "() => document.querySelector('.theirs').textContent.length > 40")
    page.get_by_role("button", name="Stop").click()
    page.locator(".facts", has_text="stopped").wait_for(timeout=1000)
    assert page.evaluate("document.activeElement.id") == "ask"
    deadline = time.monotonic() + 2
    while metric(running, "moecule_num_requests_running"):
        assert time.monotonic() < deadline, "the request still runs"
    send(page)
    page.get_by_text("132", exact=False).last.wait_for()


def test_an_error_is_shown_and_can_be_tried_again(page: Page) -> None:
    def of_no_model(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}") | {"model": "unheard-of"}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", of_no_model, times=1)
    send(page)
    error = page.locator("#talk [role=alert]")
    error.wait_for()
    assert "unheard-of" in error.text_content()
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("47 + 85 = 132", exact=True).wait_for()
    assert error.count() == 0


def test_a_worker_that_dies_ends_the_answer_with_its_reason(page: Page, running: Cluster) -> None:
    endless(page)
    send(page)
    until(page, "() => document.querySelector('.theirs').textContent.length > 40")
    for pid in running.actor_pids("gpu_worker"):
        os.kill(pid, signal.SIGKILL)
    error = page.locator("#talk [role=alert]")
    error.wait_for(timeout=8000)
    assert "worker" in error.text_content()
    state(page, "Not ready")
    page.locator("#state", has_text="Ready").filter(has_not_text="Not").wait_for(timeout=BACK_MS)


def test_the_key_goes_with_every_request_and_stays_in_this_tab(page: Page) -> None:
    def refuse(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            error = {"message": "this server wants an API key", "type": "x", "param": None, "code": "y"}
            route.fulfill(status=401, content_type="application/json", body=json.dumps({"error": error}))

    page.route("**/cluster", refuse)
    page.route("**/v1/**", refuse)
    page.locator("#notice", has_text="wants an API key").wait_for()
    key = page.get_by_label("API key")
    assert key.get_attribute("aria-invalid") == "true" and key.get_attribute("type") == "password"
    key.fill("sesame")
    state(page, "Ready")
    assert not page.locator("#notice").is_visible() and key.get_attribute("aria-invalid") is None
    send(page)
    page.get_by_text("47 + 85 = 132", exact=True).wait_for()
    page.reload()
    state(page, "Ready")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
    assert "sesame" not in page.url
    page.get_by_label("API key").fill("")
    assert page.evaluate("sessionStorage.length") == 0
    page.locator("#notice", has_text="wants an API key").wait_for()


# ---- the cluster


@pytest.mark.parametrize(("service", "actor"), [("gpu_worker", "worker-2"), ("expert_shard", "shard-1")])
def test_a_death_shows_within_two_seconds_and_so_does_the_return(
    page: Page, running: Cluster, service: str, actor: str
) -> None:
    chip = card(page, actor).locator(".chip")
    chip.filter(has_text="ready").wait_for(timeout=BACK_MS)
    started = card(page, actor).locator(".note").text_content()
    os.kill(pid_of(running, service, actor), signal.SIGKILL)
    died = time.monotonic()
    chip.filter(has_text="silent").wait_for(timeout=SHOWN_MS)
    assert time.monotonic() - died < 2
    assert "away" in (card(page, actor).get_attribute("class") or "")
    assert f"{actor} has missed its heartbeats" in page.locator("#log").text_content()
    chip.filter(has_text="ready").wait_for(timeout=BACK_MS)
    assert f"{actor} is back in a new life" in page.locator("#log").text_content()
    assert card(page, actor).locator(".note").text_content() != started, "how often it started"
    state(page, "Ready")


def pid_of(running: Cluster, service: str, actor: str) -> int:
    (pid,) = [p for p in running.actor_pids(service) if f"HONCHO_PROCESS_NAME={service}.{actor[-1]}\0" in environ(p)]
    return pid


def environ(pid: int) -> str:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().decode() + "\0"


def test_what_each_actor_does_is_live(page: Page, running: Cluster) -> None:
    endless(page)
    send(page)
    until(page, "() => document.querySelector('#running').textContent === '1'")
    until(page, "() => Number(document.querySelector('#speed').textContent) > 0")
    until(page, "() => document.querySelectorAll('.cells i.hot').length > 0")
    assert page.locator(".cells i").count() == 16, "a cell for each expert"
    assert page.locator("#hottest", has_text="Hottest: expert").is_visible()
    rows = page.locator("#shard .card").first.locator("dd").nth(1).text_content()
    assert int(rows.replace(",", "")) > 0
    page.keyboard.press("Escape")
    until(page, "() => document.querySelector('#running').textContent === '0'")
    until(page, "() => document.querySelector('#speed').textContent === '0'")


def test_a_shard_that_is_stopped_is_named_while_a_step_waits_for_it(page: Page, running: Cluster) -> None:
    """The shares are of the last two seconds, and it is given up after five."""
    card(page, "shard-2").locator(".chip").filter(has_text="ready").wait_for(timeout=BACK_MS)
    endless(page)
    send(page)
    until(page, "() => document.querySelector('.theirs')?.textContent.length > 40")
    stopped = pid_of(running, "expert_shard", "shard-2")
    os.kill(stopped, signal.SIGSTOP)
    try:
        page.locator("#worker dd").filter(has_text=re.compile(r"^([6-9]\d|100) % on shard-2$")).wait_for(timeout=4000)
    finally:
        os.kill(stopped, signal.SIGCONT)
    page.keyboard.press("Escape")
    until(page, "() => document.querySelector('#running').textContent === '0'")


def drawn(**changes: Any) -> dict[str, Any]:
    """What /cluster might say of a large model while a shard is loading again, and another is waited for."""
    experts = [{"expert": e, "tokens_per_second": 3.0 * e} for e in range(0, 256, 2)]
    shard = {
        "kind": "shard", "id": "shard-1-aa", "boot_id": "a", "state": "ready", "silent_seconds": 0, "node": "aa",
        "partitions": 32, "load_done": 30_000_000_000, "load_total": 100_000_000_000, "experts": experts,
    }  # fmt: skip
    worker = {
        "kind": "worker", "id": "worker-1-aa", "boot_id": "a", "state": "ready", "silent_seconds": 0, "node": "aa",
        "waited": [{"shard": "shard-2-aa", "share": 0.34}],
    }  # fmt: skip
    return {
        "at": time.time(), "gateway": "g", "model": "a-model-with-a-rather-long-name-that-goes-on-and-on",
        "connected": True, "reason": "experts are being loaded by shard-1 (30 %)", "map_version": 0, "partitions": 64,
        "actors": [worker, shard, shard | {"id": "shard-2-aa", "awaited": 0.34}], "happenings": [],
    } | changes  # fmt: skip


def says(page: Page, answer: dict[str, Any]) -> None:
    page.route("**/cluster", lambda route: route.fulfill(json=answer))


def test_a_load_shows_how_far_it_is(page: Page) -> None:
    says(page, drawn())
    page.locator("#notice", has_text="Not ready: experts are being loaded by shard-1 (30 %).").wait_for()
    bar = page.get_by_role("progressbar", name="Loading shard-1")
    bar.wait_for()
    assert abs(bar.evaluate("bar => bar.value / bar.max") - 0.3) < 1e-6
    assert "30 % (30.0 of 100.0 GB)" in card(page, "shard-1").text_content()


def test_who_is_slow_stands_out(page: Page) -> None:
    worker = {"kind": "worker", "boot_id": "a", "state": "ready", "silent_seconds": 0, "step_ms": 10.0}
    shard = worker | {"kind": "shard", "partitions": 32, "row_us": 50.0}
    actors = [worker | {"id": "w-1"}, worker | {"id": "w-2"}, shard | {"id": "s-1"}, shard | {"id": "s-2"}]
    says(page, drawn(actors=actors))
    card(page, "s-2").wait_for()
    assert page.locator(".slow").filter(visible=True).count() == 0, "nobody is while all are alike"
    page.unroute("**/cluster")
    says(page, drawn(actors=[actors[0] | {"step_ms": 16.0}, *actors[1:3], actors[3] | {"row_us": 90.0}]))
    card(page, "w-1").get_by_text("Its steps are the slowest").wait_for()
    card(page, "s-2").get_by_text("A row takes it longer than the others").wait_for()
    assert page.locator(".slow").filter(visible=True).count() == 2


def fact(page: Page, actor: str, name: str) -> str:
    return card(page, actor).locator("dl > div").filter(has_text=name).locator("dd").text_content() or ""


def test_whom_workers_wait_for_has_a_name(page: Page) -> None:
    both = {"boot_id": "a", "state": "ready", "silent_seconds": 0, "node": "n"}
    worker, shard = both | {"kind": "worker"}, both | {"kind": "shard", "rows_per_second": 9.0}
    timed = {"row_us": 20.0, "busy": 0.4}
    waited = [{"shard": "s-1-n", "share": 0.12}, {"shard": "s-2-n", "share": 0.34}]
    says(page, drawn(actors=[
        worker | {"id": "w-1-n", "waited": waited}, worker | {"id": "w-2-n", "waited": [waited[0] | {"share": 0.001}]},
        worker | {"id": "w-3-n", "own_experts": True}, worker | {"id": "w-4-n"},
        shard | timed | {"id": "s-1-n", "awaited": 0.12}, shard | timed | {"id": "s-2-n", "awaited": 0.34},
        shard | timed | {"id": "s-3-n", "awaited": 0.0}, shard | {"id": "s-4-n"},
    ]))  # fmt: skip
    card(page, "s-2").get_by_text("Workers wait for it the longest", exact=True).wait_for()
    assert page.locator(".slow").filter(visible=True).count() == 1
    waits = [fact(page, f"w-{n}", "Waits on shards") for n in range(1, 5)]
    assert waits == ["34 % on s-2", "0 %", "none", "–"], "on a GPU they are not known"
    assert [fact(page, f"s-{n}", "Waited for") for n in range(1, 5)] == ["12 %", "34 %", "0 %", "–"]
    assert [fact(page, f"s-{n}", "Busy") for n in (1, 4)] == ["40 %", "–"]


def test_a_gateway_that_is_gone_is_said_and_what_stands_there_is_dated(page: Page) -> None:
    page.route("**/cluster", lambda route: route.abort())
    page.locator("#notice", has_text="The gateway does not answer. What stands here is").wait_for(timeout=SHOWN_MS)
    assert page.locator("body.stale").count() == 1
    page.unroute("**/cluster")
    state(page, "Ready")
    assert not page.locator("#notice").is_visible()


def test_an_outage_of_nats_is_said(page: Page) -> None:
    says(page, drawn(connected=False))
    page.locator("#notice", has_text="no connection to NATS").wait_for()


def test_a_name_is_text_and_never_markup(page: Page) -> None:
    evil = "<img src=x onerror=alert(1)>"
    actor = {"kind": "worker", "id": evil, "boot_id": "a", "state": "ready", "silent_seconds": 0, "reason": evil}
    says(page, drawn(model=evil, reason=evil, actors=[actor], happenings=[{"at": 1, "id": evil, "what": evil}]))
    card(page, evil).wait_for()
    send(page, evil)
    page.locator(".mine", has_text=evil).wait_for(timeout=2000)
    assert page.locator("img").count() == 0


# ---- for everyone


def test_the_keyboard_is_enough(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the chat"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0, "it shows when it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "ask"
    page.keyboard.type(QUESTION)
    page.keyboard.press("Shift+Enter")
    assert page.get_by_label("Message").input_value() == f"{QUESTION}\n"
    page.keyboard.press("Enter")
    page.get_by_text("47 + 85 = 132", exact=True).wait_for()
    reached = []
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "SUMMARY":
            page.keyboard.press("Enter")
            break
    assert reached[-1] == "SUMMARY" and page.locator("details.reasoning").get_attribute("open") is not None, reached
    page.get_by_label("Message").focus()
    endless(page)
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    until(page, "() => [...document.querySelectorAll('.theirs')].at(-1).textContent.length > 40")
    page.keyboard.press("Escape")
    page.locator(".facts", has_text="stopped").wait_for(timeout=1000)


def test_all_that_takes_the_focus_shows_it(page: Page) -> None:
    for tab in range(12):
        page.keyboard.press("Tab")
        found = page.evaluate("""() => { const one = document.activeElement, style = getComputedStyle(one);
            return [one === document.body, one.tagName, style.outlineStyle, style.outlineWidth]; }""")
        assert found[0] or (found[2] == "solid" and found[3] != "0px"), (tab, found)


def test_everything_has_a_name(page: Page) -> None:
    send(page)
    page.get_by_text("47 + 85 = 132", exact=True).wait_for()
    nameless = page.evaluate("""() => [...document.querySelectorAll("input, textarea, button, progress, [role], nav")]
        .filter(one => one.checkVisibility() && !(one.labels?.[0]?.textContent.trim() || one.textContent.trim()
            || one.getAttribute("aria-label") || one.getAttribute("aria-labelledby")))
        .map(one => one.outerHTML)""")
    assert nameless == []
    assert (
        page.locator(".cells").first.get_attribute("aria-label").startswith("Experts of shard-1, tokens a second: 0:")
    )
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("h1").count() == 1


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("large", [False, True], ids=["tiny", "256 experts"])
def test_nothing_sticks_out_of_a_narrow_window(page: Page, width: int, large: bool) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    if large:
        says(page, drawn())
        page.get_by_role("progressbar", name="Loading shard-1").wait_for()
    send(page, f"What is 47 + 85? {'x' * 300}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    out = page.evaluate("""() => [...document.querySelectorAll("body *")].filter(one => one.checkVisibility()
        && !one.closest("svg, .out, .skip"))
        .filter(one => one.getBoundingClientRect().right > innerWidth + 1 || one.getBoundingClientRect().left < -1)
        .map(one => one.outerHTML.slice(0, 90))""")
    assert out == []
    if width < 500:
        small = page.evaluate("""() => [...document.querySelectorAll("button")].filter(one => one.checkVisibility()
            && one.getBoundingClientRect().height < 24).map(one => one.textContent)""")
        assert small == [], "a thumb can press it"


# WCAG's contrast of text against what lies behind it. A canvas knows what a color-mix() comes to.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const behind = one => {
    for (; one; one = one.parentElement) {
      const found = rgba(getComputedStyle(one).backgroundColor);
      if (found[3] > 250) return found;
    }
    return [255, 255, 255];
  };
  const linear = value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const contrast = one => {
    const both = [light(rgba(getComputedStyle(one).color)), light(behind(one))];
    return (Math.max(...both) + .05) / (Math.min(...both) + .05);
  };
  const says = one => [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  return [...document.querySelectorAll("body *")]
    .filter(one => one.checkVisibility() && !one.closest("svg, .skip, script") && says(one))
    .map(one => [contrast(one), one.tagName, one.className, one.textContent.slice(0, 20)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    says(page, drawn(model="tiny"))
    page.get_by_role("progressbar", name="Loading shard-1").wait_for()
    send(page)
    page.get_by_text("47 + 85 = 132", exact=True).wait_for()
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 250 and [one for one in contrasts if one[0] < 4.5] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 200) == (scheme == "dark")
