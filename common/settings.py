"""Every setting: an environment variable with the prefix MOECULE_, typed, documented and validated here alone."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common.errors import ConfigError

PREFIX = "MOECULE_"
ID_PATTERN = "^[A-Za-z0-9_-]{1,64}$"  # of an actor's id, which is a part of its subjects
ID_WORDS = "1 to 64 letters, digits, - and _"
_ORIGIN = r"(\*|[a-z][a-z0-9+.-]*://[^\s/,]+)"
ORIGINS_PATTERN = rf"^{_ORIGIN}(\s*,\s*{_ORIGIN})*$"
URL_PATTERN = r"^https?://[^\s/]\S*$"
URL_WORDS = "a URL like http://127.0.0.1:4318"
NATS_URL_PATTERN = r"^((nats|tls)://)?([^\s/?#]*@)?([^\s/?#@:\[\],]+|\[[0-9A-Za-z:.%]+\])(:\d{1,5})?(/\S*)?$"
NATS_URL_WORDS = "nats://HOST:PORT, or tls://HOST:PORT for a server with TLS"
ORIGINS_WORDS = "* or origins like https://chat.example.com, with commas between"
SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    pattern: str = "",
    says: str = "",
) -> Any:
    """`says`: the `pattern` of a text in words."""
    meta = {"doc": doc, "low": low, "high": high, "unit": unit, "pattern": pattern, "says": says}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("models/tiny", "checkpoint folder as Hugging Face lays it out")
    model_name: str = setting("", "what clients call the model; empty: the folder's name")
    weights: Literal["checkpoint", "random"] = setting(
        "checkpoint", "random: drawn from config.json alone, for work on speed; the text means nothing"
    )
    experts_fp8: bool = setting(False, "quantise bf16 experts to fp8 blocks at load, on a GPU")
    max_context: int = setting(
        0, "longest prompt plus output; 0: the model's own limit", low=0, high=1 << 24, unit="tokens"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where the model runs; auto: on a GPU if there is one")
    host: str = setting("127.0.0.1", "address the gateway listens on")
    port: int = setting(8000, "port the gateway listens on", low=1, high=65535)
    nats_url: str = setting(
        "nats://127.0.0.1:4222", "the NATS server; tls://HOST:PORT for one with TLS", pattern=NATS_URL_PATTERN,
        says=NATS_URL_WORDS,
    )  # fmt: skip
    nats_passwords: str = setting(
        "", "folder with a file named after each kind of actor: the password of the NATS user of that name"
    )
    nats_ca: str = setting("", "PEM file of who signed the NATS server's certificate; empty: whom the system trusts")
    nats_conf: str = setting("", "what NATS's line of the Procfile starts it with; empty: nats.conf")
    id: str = setting(
        "", "this actor's id; empty: made from its place in the Procfile", pattern=ID_PATTERN, says=ID_WORDS
    )
    link: Literal["auto", "mailbox", "bus"] = setting("auto", "how rows reach the shards; auto: mailbox inside a node")
    link_shards: int = setting(
        8, "shards that a worker on a GPU has memory set aside for", low=1, high=256, unit="shards"
    )
    expert_copies: int = setting(
        1, "shards that hold each expert, as far as there are shards", low=1, high=16, unit="shards"
    )
    kv_pages: int = setting(
        0, "KV pages of 64 tokens; 0: a sixteenth of the memory, at most 4096; on a GPU what MOECULE_GPU_MEMORY leaves",
        low=0, high=1 << 24, unit="pages",
    )  # fmt: skip
    max_batch: int = setting(64, "requests that run at a time on a worker", low=1, high=1024, unit="requests")
    chunk_tokens: int = setting(
        256, "prompt tokens computed in one step (Procfile.gpu has 4096)", low=1, high=65536, unit="tokens"
    )
    kv_cache: Literal["bf16", "fp8"] = setting("bf16", "how a GPU keeps the KV cache; fp8: 1.8 times the tokens")
    gpu_memory: float = setting(
        0.92,
        "share of a GPU's memory that is full, whoever fills it, once a worker has taken what is left for its KV cache",
        low=0.05,
        high=1.0,
    )
    itl_ms: float = setting(
        0.0, "longest time between two tokens of a running request while prompts are computed; 0: no limit", low=0,
        high=60_000, unit="ms",
    )  # fmt: skip
    queue_limit: int = setting(
        256, "requests a worker holds beside the running ones", low=0, high=1 << 20, unit="requests"
    )
    prefix_cache: bool = setting(True, "reuse the KV pages of equal prefixes")
    pin: bool = setting(False, "bind each worker and shard to processor cores of its own")
    threads: int = setting(1, "intra-op threads of a worker or shard on CPU", low=1, high=256, unit="threads")
    api_keys: str = setting("", "file with a line an API key (see services/gateway/keys.py); empty: none is asked for")
    cors_origins: str = setting(
        "", "web origins whose pages may call the gateway; *: all", pattern=ORIGINS_PATTERN, says=ORIGINS_WORDS
    )
    body_limit: int = setting(4 << 20, "largest HTTP body", low=1024, high=1 << 30, unit="bytes")
    receive_seconds: float = setting(
        60.0, "how long a request's headers may take to arrive, and then its body", low=0.1, high=86_400, unit="s"
    )
    send_seconds: float = setting(
        30.0, "how long a client may take nothing of its answer before it is cut off", low=0.1, high=86_400, unit="s"
    )
    drain_seconds: float = setting(
        4.0, "how long a leaving actor finishes what is in flight", low=0, high=86_400, unit="s"
    )
    traces: str = setting(
        "", "OTLP/HTTP endpoint that gets the traces; empty: none are made", pattern=URL_PATTERN, says=URL_WORDS
    )
    traces_ratio: float = setting(
        1.0, "share of requests that are traced, where their traceparent does not decide", low=0, high=1
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe log line shown")
    log_json: bool = setting(False, "log lines as JSON objects")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Raises ConfigError naming the variable, what it holds and what it may hold."""
        environ = os.environ if environ is None else environ
        values = {}
        for field in dataclasses.fields(cls):
            name = variable(field.name)
            if text := environ.get(name, "").strip():
                values[field.name] = parse(field.name, text, called=name)
        return cls(**values)

    @property
    def served_name(self) -> str:
        return self.model_name or Path(self.model).resolve().name


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
KINDS: dict[str, Any] = get_type_hints(Settings)
URLS = ("nats_url", "traces")  # they may hold a password


def variable(name: str) -> str:
    return PREFIX + name.upper()


def unknown_settings(environ: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each MOECULE_ variable that is no setting."""
    known = {name.upper() for name in FIELDS}
    sentences = []
    for name in os.environ if environ is None else environ:
        if name.startswith(PREFIX) and (rest := name.removeprefix(PREFIX)) not in known:
            near = difflib.get_close_matches(rest, known, n=1)
            sentences.append(f"{name} is no setting" + (f"; did you mean {PREFIX}{near[0]}?" if near else ""))
    return sentences


def parse(name: str, text: str, called: str) -> Any:
    """The value of the setting `name`. Raises ConfigError, whose sentence has the setting `called` so."""
    meta = FIELDS[name].metadata
    value = _value(KINDS[name], text)
    if value is None or (meta["pattern"] and not re.fullmatch(meta["pattern"], text)):
        shown = _without_any_login(text) if name in URLS else text
        raise ConfigError(f"{called} is {shown!r}: use {form(name)}")
    low, high = meta["low"], meta["high"]
    if low is not None and not low <= value <= high:
        raise ConfigError(f"{called} is {text}: use {bounds(name)}")
    return value


def form(name: str) -> str:
    """In words, what a setting's text must look like."""
    kind = KINDS[name]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = {bool: "1 or 0", int: "a whole number", float: "a number"}
    return words.get(kind) or FIELDS[name].metadata["says"] or "any text"


def bounds(name: str) -> str:
    """In words, between what a number must lie, and its unit; empty for any other setting."""
    low, high, unit = (FIELDS[name].metadata[key] for key in ("low", "high", "unit"))
    if low is None:
        return ""
    return f"from {low} to {high}" + (f" {unit}" if unit else "")


def _value(kind: Any, text: str) -> Any:
    """None if `text` is malformed."""
    if get_origin(kind) is Literal:
        return text.lower() if text.lower() in get_args(kind) else None
    if kind is bool:
        return SWITCH.get(text.lower())
    try:
        return kind(text)
    except ValueError:
        return None


def without_login(url: str) -> str:
    """For logs and documents: no user's name and password."""
    scheme, there, rest = url.rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{there}{host.rpartition('@')[2]}{slash}{path}"


def _without_any_login(text: str) -> str:
    """Of what should be a URL: in one that is malformed, a password may be whatever stands before the last @."""
    scheme, there, rest = text.partition("://") if "://" in text else ("", "", text)
    return f"{scheme}{there}{rest.rpartition('@')[2]}"


def node_id() -> str:
    """Which machine this is: two actors with the same one can share memory and Unix sockets."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        boot, namespace = socket.gethostname(), sys.platform
    return hashlib.blake2b(f"{boot} {namespace}".encode(), digest_size=4).hexdigest()


def actor_id(kind: str, settings: Settings, environ: Mapping[str, str] | None = None) -> str:
    """MOECULE_ID, or kind, place in the Procfile (honcho's process name) and node: stable over restarts."""
    if settings.id:
        return settings.id
    return f"{kind}-{place_in_procfile(environ) or os.getpid()}-{node_id()}"


def place_in_procfile(environ: Mapping[str, str] | None = None) -> int:
    """2 for the process that honcho calls `expert_shard.2`; 0 for one that honcho did not start."""
    place = (os.environ if environ is None else environ).get("HONCHO_PROCESS_NAME", "").rpartition(".")[2]
    return int(place) if place.isdecimal() else 0
