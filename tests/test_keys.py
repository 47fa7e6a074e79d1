"""API keys: their file, who they let in, and what each may have at a time."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from common.clock import FakeClock
from common.errors import ConfigError, DeadlineExceeded, InvalidKey, InvalidRequest, RateLimited
from common.messages import Sampling
from common.preflight import check_api_keys
from common.settings import Settings
from services.gateway.keys import Keys, Malformed, bearer, parse
from services.gateway.limits import Caller, Key
from services.gateway.prepare import Job

ALICE, NIGHTLY, OPS = "mk-alice-0123456789", "mk-nightly-0123456789", "mk-ops-0123456789"
TEXT = f"""
# who      key
alice      {ALICE}
nightly    sha256:{hashlib.sha256(NIGHTLY.encode()).hexdigest()}   requests=2 tokens=100 per_minute=3 priority=10

ops\t{OPS} admin=1 priority=-5
"""

OTHER = "line 1: after the key come requests=N, tokens=N, per_minute=N, priority=N and admin=1, nothing else"
SHORT = "line 1: the key must be 16 to 512 characters of ASCII: make one as the README says"


# ---- the file


def test_a_line_a_key() -> None:
    alice, nightly, ops = parse(TEXT)
    assert alice == Key("alice", hashlib.sha256(ALICE.encode()).digest())
    assert nightly == Key("nightly", hashlib.sha256(NIGHTLY.encode()).digest(), 2, 100, 3, 10)
    assert (ops.name, ops.admin, ops.priority) == ("ops", True, -5)
    assert (alice.requests, alice.tokens, alice.per_minute, alice.priority, alice.admin) == (0, 0, 0, 0, False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("alice", "line 1: write `name key`, and limits after it"),
        (f"# keys\na/b {ALICE}", "line 2: the name (the first word) must be 1 to 64 letters, digits, -, _ and ."),
        ("alice short", SHORT),
        ("alice mk-über-0123456789", SHORT),
        ("alice sha256:0123", "line 1: after sha256: there must be 64 hexadecimal digits"),
        (f"alice {ALICE} request=3", OTHER),
        (f"alice {ALICE} requests=many", OTHER),
        (f"alice {ALICE} requests=0", "line 1: requests must be from 1 to 1000000"),
        (f"alice {ALICE} tokens=5 tokens=6", "line 1: tokens is there twice"),
        (f"alice {ALICE}\nalice {OPS}", "line 2: the name 'alice' is there twice: give each key its own"),
        (f"alice {ALICE}\nbob {ALICE}", "line 2: the key is the one of 'alice': make another for 'bob'"),
        ("# none yet\n", "there is no key in it: write a line `name key`, or unset MOECULE_API_KEYS to ask for none"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_without_repeating_it(text: str, sentence: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse(text)
    assert str(caught.value) == sentence
    assert not any(secret in sentence for secret in (ALICE, OPS, "0123"))


def test_many_keys_are_read_in_a_time_that_grows_no_faster_than_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Counted(bytes):
        __hash__ = bytes.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return bytes.__eq__(self, other)

    monkeypatch.setattr("services.gateway.keys.digest_of", lambda secret: Counted(secret.encode()))
    keys = parse("\n".join(f"name{i} mk-0123456789abc-{i}" for i in range(2000)))
    assert [keys[0].name, keys[-1].name, len(keys)] == ["name0", "name1999", 2000]
    assert compared < 100, "2 million, if each is compared to those before it"


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "keys"
    write(file, TEXT)
    yield file


def write(path: Path, text: str | bytes) -> None:
    """As editors do: another file takes the name."""
    new = path.with_name("new")
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    new.chmod(0o600)
    new.rename(path)


def rewrite(path: Path, text: str) -> None:
    """As a shell's > does: the file stays the same one."""
    path.write_text(text)


def read(path: object, clock: FakeClock | None = None) -> Keys:
    return Keys(str(path), clock or FakeClock(), structlog.get_logger())


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"alice", "line 1: write"), (b"\xff\xfe", "it is not UTF-8"), (b"#" * (4 << 20) + b"##", "it is larger than")],
    ids=["malformed", "binary", "large"],
)
def test_a_file_that_cannot_be_used_ends_the_start(path: Path, content: bytes, why: str) -> None:
    write(path, content)
    for reader in (read, checked):
        with pytest.raises(ConfigError, match=f"MOECULE_API_KEYS: {path}: {why}"):
            reader(path)


def checked(path: Path) -> None:
    """As `python -m common.supervisor --check` does."""
    check_api_keys(Settings(api_keys=str(path)))


def test_a_fifo_keeps_nobody_waiting(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for reader in (read, checked):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: it is no regular file"):
            reader(path)


def test_a_file_that_is_not_there_ends_the_start(path: Path) -> None:
    for reader in (read, checked):
        with pytest.raises(ConfigError, match=f"{path}x: cannot be read: No such file or directory"):
            reader(path.with_name("keysx"))


def test_the_check_takes_a_good_file_and_none(path: Path) -> None:
    checked(path)
    check_api_keys(Settings())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
def test_a_file_that_others_can_read_is_warned_about(path: Path, mode: int) -> None:
    path.chmod(mode)
    with capture_logs() as logs:
        read(path)
    warned = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert warned == ([] if mode == 0o600 else ["others can read the file of the API keys: chmod 600 it"])


# ---- who is let in


def test_each_key_is_its_own_caller(path: Path) -> None:
    keys = read(path)
    assert [keys.caller(secret).key.name for secret in (ALICE, NIGHTLY, OPS)] == ["alice", "nightly", "ops"]
    assert keys.caller(ALICE) is keys.caller(ALICE)


@pytest.mark.parametrize("secret", [None, "", ALICE[:-1], ALICE + "x", ALICE.upper(), "alice", "\udc80", "ü" * 20])
def test_whoever_shows_no_key_is_refused(path: Path, secret: str | None) -> None:
    with pytest.raises(InvalidKey) as caught:
        read(path).caller(secret)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_the_digest_is_no_key(path: Path) -> None:
    for shown in (
        hashlib.sha256(NIGHTLY.encode()).hexdigest(),
        f"sha256:{hashlib.sha256(NIGHTLY.encode()).hexdigest()}",
    ):
        with pytest.raises(InvalidKey):
            read(path).caller(shown)


def test_without_a_file_everyone_is_let_in() -> None:
    keys = read("")
    assert not keys.wanted and keys.caller(None) is keys.caller("whatever")
    assert keys.caller(None).key.admin


def test_every_key_is_compared_to_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, compared = read(path), []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    assert keys.caller(ALICE).key.name == "alice"  # the first of them
    assert len(compared) == 3


@pytest.mark.parametrize(
    ("value", "key"),
    [(b"Bearer abc", "abc"), (b"bearer  abc ", "abc"), (b"Basic abc", None), (b"Bearer ", None), (b"abc", None),
     (b"Bearer \xff", "\xff")],
)  # fmt: skip
def test_the_key_of_a_request(value: bytes, key: str | None) -> None:
    assert bearer([(b"host", b"x"), (b"authorization", value)]) == key
    assert bearer([(b"host", b"x")]) is None


# ---- a file that changes


async def looked(clock: FakeClock) -> None:
    """The file is looked at once more; a thread does it."""
    await clock.advance(1.0)
    for _ in range(200):
        await asyncio.sleep(0.001)
        if clock._sleepers:
            return
    raise AssertionError("it was not looked at")


async def test_a_changed_file_holds_without_a_restart(path: Path) -> None:
    clock = FakeClock()
    keys = read(path, clock)
    following = asyncio.create_task(keys.follow())
    alice = keys.caller(ALICE)
    with alice.request():
        await looked(clock)
        assert keys.caller(ALICE) is alice
        new = "mk-alice-another-key"
        write(path, f"alice {new} requests=1")
        with pytest.raises(InvalidKey):
            keys.caller(new)
        await looked(clock)
        with pytest.raises(InvalidKey):
            keys.caller(ALICE)
        with pytest.raises(InvalidKey):
            keys.caller(OPS)
        with pytest.raises(RateLimited), keys.caller(new).request():  # what began with the old key counts
            pass
    with keys.caller(new).request():
        pass
    following.cancel()


async def test_a_file_that_was_broken_or_lost_changes_nothing(path: Path) -> None:
    clock = FakeClock()
    keys = read(path, clock)
    following = asyncio.create_task(keys.follow())
    with capture_logs() as logs:
        await looked(clock)
        for content in ("alice oops", b"\xff"):
            write(path, content)
            await looked(clock)
            await looked(clock)
        os.unlink(path)
        await looked(clock)
        await looked(clock)
        assert keys.caller(ALICE).key.name == "alice"
        write(path, f"alice {OPS}")
        await looked(clock)
        assert keys.caller(OPS).key.name == "alice"
    assert [entry["log_level"] for entry in logs] == ["error"] * 3 + ["info"]
    whys = ("line 1: the key must", "it is not UTF-8", "cannot be read: No s")
    assert all(entry["why"].startswith(why) for entry, why in zip(logs, whys, strict=False))
    assert not any(secret in str(logs) for secret in (ALICE, NIGHTLY, OPS, "oops"))
    following.cancel()


async def test_what_cannot_be_read_is_told_once(path: Path) -> None:
    clock = FakeClock()
    keys = read(path, clock)
    following = asyncio.create_task(keys.follow())
    with capture_logs() as logs:
        for _ in range(2):
            os.unlink(path)
            os.mkdir(path)
            for _ in range(3):
                await looked(clock)
            os.rmdir(path)
            write(path, f"alice {OPS}")
            await looked(clock)
    assert [entry["log_level"] for entry in logs] == ["error", "info"] * 2
    assert logs[0]["path"] == str(path) and logs[0]["why"] == "cannot be read: Is a directory"
    assert keys.caller(OPS).key.name == "alice"
    following.cancel()


async def test_a_rewrite_of_the_same_length_is_seen(path: Path) -> None:
    clock = FakeClock()
    keys = read(path, clock)
    following = asyncio.create_task(keys.follow())
    before = os.stat(path)
    rewrite(path, TEXT.replace(ALICE, ALICE[::-1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    await looked(clock)
    await looked(clock)
    assert keys.caller(ALICE[::-1]).key.name == "alice"
    following.cancel()


# ---- limits


def caller(clock: FakeClock | None = None, **limits) -> Caller:
    return Caller(Key("k", b"", **limits), clock or FakeClock())


def job(prompt: int, out: int) -> Job:
    return Job(0, (1,) * prompt, (), Sampling(max_tokens=out))


def test_requests_in_flight() -> None:
    one = caller(requests=2)
    with one.request():
        with one.request():
            with pytest.raises(RateLimited, match="'k' may have 2 requests in flight") as caught, one.request():
                pass
            assert (caught.value.status, caught.value.retry_after) == (429, 1)
        with one.request():
            assert one.requests == 2
    assert one.requests == 0


def test_each_choice_is_a_request_in_flight() -> None:
    one = caller(requests=3)
    with one.request() as permit, one.request():
        with pytest.raises(RateLimited):
            permit.take([job(1, 1)] * 3)
        assert one.requests == 2
        permit.take([job(1, 1)] * 2)
        assert one.requests == 3
    assert (one.requests, one.tokens) == (0, 0)
    with one.request() as permit, pytest.raises(InvalidRequest, match="each of the 4 choices") as caught:
        permit.take([job(1, 1)] * 4)
    assert caught.value.param == "n"


def test_tokens_in_flight() -> None:
    one = caller(tokens=100)
    with one.request() as first:
        first.take([job(10, 50)])
        with one.request() as second:
            with pytest.raises(RateLimited, match=r"100 tokens in flight .* has 60: this request needs 41"):
                second.take([job(1, 40)])
            second.take([job(1, 39)])
            assert one.tokens == 100
    assert one.tokens == 0
    with one.request() as third, pytest.raises(InvalidRequest, match="ask for fewer") as caught:
        third.take([job(50, 51)])
    assert caught.value.param == "max_tokens"
    assert (one.requests, one.tokens) == (0, 0)


async def test_requests_a_minute() -> None:
    clock = FakeClock()
    one = caller(clock, per_minute=3)

    def ask() -> None:
        with one.request():
            pass

    for _ in range(3):
        ask()
        await clock.advance(10)
    for wait in (30, 20):
        with pytest.raises(RateLimited, match="3 requests a minute") as caught:
            ask()
        assert caught.value.retry_after == wait
        await clock.advance(10)
    await clock.advance(9.5)
    with pytest.raises(RateLimited) as caught:
        ask()
    assert caught.value.retry_after == 1
    await clock.advance(0.5)
    ask()
    with pytest.raises(RateLimited):
        ask()


def test_what_fails_gives_back_what_it_took() -> None:
    one = caller(requests=1, tokens=10)
    with pytest.raises(RuntimeError), one.request() as permit:
        permit.take([job(1, 9)])
        raise RuntimeError
    assert (one.requests, one.tokens) == (0, 0)


# ---- priorities and deadlines


def test_a_key_bounds_the_priority_of_its_requests() -> None:
    with caller(priority=5).request() as permit:
        assert [permit.take([job(1, 1)], p)[0].priority for p in (None, 5, 9)] == [5, 5, 9]
        with pytest.raises(InvalidRequest, match="may ask for priority 5 or a higher number") as caught:
            permit.take([job(1, 1)], 4)
        assert caught.value.param == "priority"


def test_without_keys_any_priority_is_taken() -> None:
    with read("").caller(None).request() as permit:
        assert [permit.take([job(1, 1)], p)[0].priority for p in (None, -7)] == [0, -7]


async def test_the_sooner_deadline_holds_and_counts_from_the_beginning() -> None:
    clock = FakeClock()
    await clock.advance(100)
    with caller(clock).request(timeout=5) as permit:
        await clock.advance(2)
        assert permit.take([job(1, 1)], timeout=3)[0].deadline == 103
        assert permit.take([job(1, 1)], timeout=9)[0].deadline == 105
        assert permit.take([job(1, 1)])[0].deadline == 105
        await clock.advance(3)
        with pytest.raises(DeadlineExceeded):
            permit.take([job(1, 1)])
    with caller(clock).request() as permit:
        (taken,) = permit.take([job(1, 1)])
        assert (taken.deadline, taken.tenant) == (None, "k")
