"""benchmarks.start: what it reads from the log of a start, what it leaves behind, and one start of the real cluster."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import start

LINES = [
    (0.1, "02:23:09 system         | nats.1 started (pid=7532)"),
    (0.2, "02:23:09 system         | gpu_worker.1 started (pid=7538)"),
    (0.3, "02:23:09 nats.1         | [7549] 2026/11/27 02:23:09.921975 [INF] Server is ready"),
    (1.0, '02:23:14 expert_shard.2 | {"kind": "shard", "event": "ready", "level": "info"}'),
    (1.5, '02:23:14 expert_shard.1 | {"kind": "shard", "event": "ready", "level": "info"}'),
    (1.6, "02:23:15 gateway.1      | Moecule is ready at http://127.0.0.1:36113"),
    (1.7, "02:23:15 gateway.1      | [1, 2]"),
    (1.8, "something else"),
    (9.0, '02:23:24 expert_shard.1 | {"kind": "shard", "event": "ready", "level": "info"}'),
]

SERVER = """
import http.server, json, sys, time
began = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body=b"{}"):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(200, json.dumps({"data": [{"id": "m"}]}).encode())
        elif self.path == "/ready":
            self.answer(READY if time.monotonic() - began > 0.6 else 503)
        else:
            self.answer(200)
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.answer(200 if asked == {"model": "m", "prompt": "Once", "max_tokens": 1} else 400)
    def log_message(self, *_):
        pass
print('00:00:00 server.1 | {"event": "up"}', flush=True)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
try:
    server.serve_forever()
except KeyboardInterrupt:
    pass
"""
STUBBORN = """
import signal, subprocess, sys
sleep = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", sleep], stdout=subprocess.PIPE)
child.stdout.readline()
with open(sys.argv[0] + ".child", "w") as file:
    file.write(str(child.pid))
"""


def command(tmp_path: Path, code: str, ready: int = 200) -> list[str]:
    (tmp_path / "server.py").write_text(textwrap.dedent(code).replace("READY", str(ready)))
    return [sys.executable, str(tmp_path / "server.py"), "{port}"]


def test_phases_are_told_by_the_last_line_before_it_is_ready() -> None:
    expected = {"processes started": 0.2, "nats: ready": 0.3, "expert_shard: ready": 1.5}
    assert start.phases(LINES, until=2.0) == expected


def test_the_table_is_in_the_order_of_the_medians() -> None:
    runs = [{"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 0.5}, {"a": 2.0, "b": 9.0, "c": 0.1}]
    *_, c, b, a = start.table(runs).splitlines()
    assert a == "| a | 3.00 | 1.00 | 2.00 | 2.00 |"
    assert b == "| b | 1.00 | 0.50 | 9.00 | 1.00 |"
    assert c == "| c | - | - | 0.10 | 0.10 |"


def test_a_command_of_ones_own(tmp_path: Path) -> None:
    run = start.start_once(command(tmp_path, SERVER), cold=False, limit=20)
    assert list(run) == ["server: up", "/health answers", "/ready answers", "a token is answered"]
    assert run["server: up"] < run["/health answers"] < 0.6 < run["/ready answers"] < run["a token is answered"]


def test_a_server_without_ready_is_ready_when_it_is_healthy(tmp_path: Path) -> None:
    run = start.start_once(command(tmp_path, SERVER.replace("else 503", "else 404"), 500), cold=False, limit=20)
    assert run["/ready answers"] < 0.6


def test_a_process_left_behind_is_killed_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "LAST_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match="1 processes had to be killed"):
        start.start_once(command(tmp_path, STUBBORN + SERVER), cold=False, limit=20)
    child = Path("/proc", (tmp_path / "server.py.child").read_text())
    deadline = time.monotonic() + 5
    while child.exists() and (child / "cmdline").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or not (child / "cmdline").read_bytes(), "whoever inherited it may not have buried it yet"


def test_a_command_that_ends_tells_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with exit code 3\n(.*\n)*no such model"):
        start.start_once(command(tmp_path, "print('no such model'); raise SystemExit(3)"), cold=False, limit=20)


FAILED_START = """\
00:00:00 nats.1         | moecule: MOECULE_FOO is no setting
00:00:01 gateway.1      | moecule: there is no model folder
00:00:01 scheduler.1    | moecule: scheduler ended with exit code 1: restart in 0.1 s
00:00:02 gateway.1      | {"event": "moecule: nothing"}
00:00:02 system         | nats.1 stopped (rc=78)"""


def test_the_reason_of_a_failed_start_is_repeated(tmp_path: Path) -> None:
    code = f"print({FAILED_START!r}); raise SystemExit(78)"
    with pytest.raises(RuntimeError, match=r"ended with exit code 78, moecule: there is no model folder\n00:00:00"):
        start.start_once(command(tmp_path, code), cold=False, limit=20)


def test_a_command_that_never_answers(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="/health did not answer within 0 s"):
        start.start_once(command(tmp_path, "import time; time.sleep(60)"), cold=False, limit=0.3)


def test_a_cold_start_has_a_cache_of_its_own() -> None:
    with start.environment(cold=True) as env:
        place = Path(env["TRITON_CACHE_DIR"])
        assert place.parent.is_dir() and not place.exists()
    assert not place.parent.exists()


@pytest.mark.cluster
def test_the_cluster_of_make_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECULE_DEVICE", "cpu")
    began = time.monotonic()
    run = start.start_once(start.make_serve(), cold=False, limit=120)
    order = ["processes started", "nats: ready", "expert_shard: ready", "expert_shard: holding"]
    order += ["gpu_worker: expert shard attached", "/ready answers", "a token is answered"]
    assert sorted(order, key=lambda phase: run[phase]) == order
    assert {"scheduler: ready", "gateway: listening", "gpu_worker: ready", "/health answers"} <= set(run)
    assert run["processes started"] > 0 and run["a token is answered"] < time.monotonic() - began
