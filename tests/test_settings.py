"""Settings: what they are without a variable, what a variable may hold, and the sentence for what it may not."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.cores import cores_of, pin_actor
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.preflight import nats_address, shortfalls
from common.settings import PREFIX, Settings, actor_id, node_id, unknown_settings


def test_without_a_variable_they_are_the_defaults():
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"MOECULE_PORT": "  "}) == Settings(), "an empty variable counts as none"


def test_every_number_has_bounds():
    """What has none ends in a message that cannot be sent, or memory that is not there, and a restart without end."""
    numbers = [field for field in dataclasses.fields(Settings) if type(field.default) in (int, float)]
    assert len(numbers) > 10
    for field in numbers:
        assert field.metadata["low"] <= field.default <= field.metadata["high"], field.name


def test_each_kind_is_read():
    env = {"PORT": "9000", "DRAIN_SECONDS": "1.5", "PREFIX_CACHE": "off", "LINK": "BUS", "MODEL": " models/tiny "}
    read = Settings.from_env({PREFIX + name: value for name, value in env.items()})
    assert read == Settings(port=9000, drain_seconds=1.5, prefix_cache=False, link="bus", model="models/tiny")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("PORT", "http", "MOECULE_PORT is 'http': use a whole number"),
        ("PORT", "0", "MOECULE_PORT is 0: use from 1 to 65535"),
        ("PORT", "80.5", "MOECULE_PORT is '80.5': use a whole number"),
        ("DRAIN_SECONDS", "soon", "MOECULE_DRAIN_SECONDS is 'soon': use a number"),
        ("DRAIN_SECONDS", "-1", "MOECULE_DRAIN_SECONDS is -1: use from 0 to 86400 s"),
        ("DRAIN_SECONDS", "nan", "MOECULE_DRAIN_SECONDS is nan: use from 0 to 86400 s"),
        ("DRAIN_SECONDS", "inf", "MOECULE_DRAIN_SECONDS is inf: use from 0 to 86400 s"),
        (
            "QUEUE_LIMIT",
            "99999999999999999999",
            "MOECULE_QUEUE_LIMIT is 99999999999999999999: use from 0 to 1048576 requests",
        ),
        ("PREFIX_CACHE", "perhaps", "MOECULE_PREFIX_CACHE is 'perhaps': use 1 or 0"),
        ("DEVICE", "tpu", "MOECULE_DEVICE is 'tpu': use one of auto, cpu, cuda"),
        ("ID", "a.b", "MOECULE_ID is 'a.b': use 1 to 64 letters, digits, - and _"),
        (
            "CORS_ORIGINS",
            "https://a.example/",
            "MOECULE_CORS_ORIGINS is 'https://a.example/': use * or origins like https://chat.example.com, "
            "with commas between",
        ),
        (
            "NATS_URL",
            "ws://user:se/cret@localhost:8080",
            "MOECULE_NATS_URL is 'ws://localhost:8080': use nats://HOST:PORT, or tls://HOST:PORT for a server with TLS",
        ),
        ("ID", "x" * 65, f"MOECULE_ID is {'x' * 65!r}: use 1 to 64 letters, digits, - and _"),
    ],
)
def test_what_is_malformed_is_named(name: str, value: str, sentence: str):
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({PREFIX + name: value})
    assert caught.value.message == sentence


@pytest.mark.parametrize(
    ("url", "works"),
    [
        ("nats://127.0.0.1:4222", True),
        ("tls://nats.example.com", True),
        ("nats://[::1]:4222/", True),
        ("nats://user:p@ss@localhost:4222", True),
        ("localhost:4222", True),
        ("localhost", True),
        ("ws://localhost:8080", False),
        ("wss://localhost", False),
        ("http://localhost:4222", False),
        ("TLS://localhost:4222", False),  # nats-py does not know it
        ("nats://", False),
        ("tls://:4222", False),
        ("nats://user:secret@", False),
        ("nats://user:secret@:4222", False),
        (":4222", False),
        ("nats://localhost:port", False),
        ("nats://a:4222,nats://b:4222", False),
    ],
)
def test_a_nats_url_has_a_host_and_a_scheme_that_works(url: str, works: bool):
    environ = {"MOECULE_NATS_URL": url}
    if works:
        assert Settings.from_env(environ).nats_url == url
        assert nats_address(Settings.from_env(environ))[0] in ("127.0.0.1", "nats.example.com", "::1", "localhost")
        return
    with pytest.raises(ConfigError, match=r"MOECULE_NATS_URL is .*: use nats://HOST:PORT, or tls://") as caught:
        Settings.from_env(environ)
    assert "secret" not in caught.value.message


def test_a_port_that_is_none_is_told_without_the_login():
    with pytest.raises(ConfigError, match=r"MOECULE_NATS_URL is 'nats://localhost:99999': use nats://HOST:PORT"):
        nats_address(Settings(nats_url="nats://user:secret@localhost:99999"))


def test_an_unknown_variable_is_told_with_the_nearest_one():
    env = {"MOECULE_PROT": "1", "MOECULE_PORT": "1", "OTHER": "1", "MOECULE_QQQQQQQQ": "1"}
    assert unknown_settings(env) == [
        "MOECULE_PROT is no setting; did you mean MOECULE_PORT?",
        "MOECULE_QQQQQQQQ is no setting",
    ]


def test_every_setting_is_documented_and_its_default_is_allowed():
    for field in dataclasses.fields(Settings):
        assert field.metadata["doc"], field.name
        if field.default != "":
            text = str(int(field.default) if isinstance(field.default, bool) else field.default)
            assert getattr(Settings.from_env({PREFIX + field.name.upper(): text}), field.name) == field.default


def test_an_actor_keeps_its_id_over_restarts_and_shares_it_with_no_other():
    first = actor_id("shard", Settings(), {"HONCHO_PROCESS_NAME": "expert_shard.1"})
    assert first == actor_id("shard", Settings(), {"HONCHO_PROCESS_NAME": "expert_shard.1"})
    assert first == f"shard-1-{node_id()}"
    assert first != actor_id("shard", Settings(), {"HONCHO_PROCESS_NAME": "expert_shard.2"})
    assert actor_id("shard", Settings(id="mine"), {"HONCHO_PROCESS_NAME": "expert_shard.1"}) == "mine"


def test_the_served_name_is_the_folder_unless_given():
    assert Settings(model="models/tiny/").served_name == "tiny"
    assert Settings(model_name="other").served_name == "other"


@pytest.mark.parametrize(
    ("kind", "place", "threads", "cores"),
    [
        ("worker", 1, 1, {0}),
        ("shard", 1, 1, {1}),
        ("shard", 2, 1, {0}),
        ("worker", 2, 1, {1}),
        ("worker", 1, 2, {0, 1}),
    ],
)
def test_on_two_cores_a_worker_and_its_first_shard_do_not_share_one(kind: str, place: int, threads: int, cores: set):
    assert cores_of(kind, place, threads, [1, 0]) == cores


def test_an_actor_is_pinned_when_that_is_set_and_all_it_starts_with_it(monkeypatch: pytest.MonkeyPatch):
    before = os.sched_getaffinity(0)
    monkeypatch.setenv("HONCHO_PROCESS_NAME", "gpu_worker.1")
    try:
        pin_actor("worker", Settings())
        assert os.sched_getaffinity(0) == before
        pin_actor("worker", Settings(pin=True))
        with ThreadPoolExecutor() as pool:
            assert pool.submit(os.sched_getaffinity, 0).result() == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


def test_what_counts_for_less_than_it_says_is_told() -> None:
    def told(**settings: Any) -> list[str]:
        return list(shortfalls(Settings(device="cpu", **settings), ModelConfig.load("models/tiny")))

    assert told() == told(max_context=4096, kv_pages=64) == told(max_context=128, kv_pages=2) == []
    assert told(max_context=5000) == ["MOECULE_MAX_CONTEXT is 5000: the model's own limit of 4096 tokens holds"]
    assert told(kv_pages=2) == ["MOECULE_KV_PAGES is 2: a request may have 128 tokens, not the context's 4096"]
    assert told(experts_fp8=True) == ["MOECULE_EXPERTS_FP8 is 1: that counts on a GPU alone"]
