"""What can be known to fail before anything starts, each as one sentence."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.errors import ConfigError
from common.pages import PAGE
from common.settings import NATS_URL_WORDS, Settings, without_login
from common.tracing import check_traces
from common.weight_files import weight_files

if TYPE_CHECKING:
    from common.model_config import ModelConfig


def check_all(settings: Settings) -> None:
    check_device(settings)
    check_model(settings)
    check_weights(settings)
    check_traces(settings)
    check_api_keys(settings)
    if check_nats_port(settings):
        check_nats_users(settings)
    check_http_port(settings)


def has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def check_device(settings: Settings) -> None:
    if settings.device == "cuda" and not has_gpu():
        raise ConfigError("MOECULE_DEVICE is 'cuda', and this machine shows no NVIDIA GPU: unset it or use cpu")


def check_model_folder(settings: Settings) -> None:
    folder = Path(settings.model)
    if not folder.is_dir():
        raise ConfigError(f"there is no model folder {settings.model!r} (MOECULE_MODEL)")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"the model folder {settings.model!r} (MOECULE_MODEL) has no config.json")


def check_model(settings: Settings) -> ModelConfig:
    """Raises ConfigError also for a config.json that names what we do not have."""
    check_model_folder(settings)
    from common.model_config import ModelConfig  # needed by this check alone

    return ModelConfig.load(settings.model, settings.weights)


def check_weights(settings: Settings) -> None:
    if settings.weights == "checkpoint":
        weight_files(Path(settings.model))


def check_api_keys(settings: Settings) -> None:
    """What the gateway would find, said before anything starts."""
    if settings.api_keys:
        from services.gateway.keys import check_keys  # the one check that is a service's own, and imports little

        check_keys(settings.api_keys)


def nats_address(settings: Settings) -> tuple[str, int]:
    try:
        parts = urlsplit(settings.nats_url if "//" in settings.nats_url else f"nats://{settings.nats_url}")
        host, port = parts.hostname, parts.port or 4222
    except ValueError:
        host, port = None, 0
    if not host:
        raise ConfigError(f"MOECULE_NATS_URL is {without_login(settings.nats_url)!r}: use {NATS_URL_WORDS}")
    return host, port


def check_nats_port(settings: Settings) -> bool:
    """Whether NATS belongs on this machine: False for an address of another one."""
    host, port = nats_address(settings)
    taken = f"something listens at {host}:{port}, where NATS would, so stop it or set MOECULE_NATS_URL"
    return _can_listen(host, port, taken)


def check_nats_users(settings: Settings) -> None:
    """Of a server that is started here: without users it lets everyone in, whatever password an actor shows."""
    for name, value in (("MOECULE_NATS_PASSWORDS", settings.nats_passwords), ("MOECULE_NATS_CA", settings.nats_ca)):
        if value and not settings.nats_conf:
            raise ConfigError(f"{name} is set, and nats.conf has neither users nor TLS: set MOECULE_NATS_CONF")


def check_http_port(settings: Settings) -> None:
    host, port = settings.host, settings.port
    if not _can_listen(host, port, f"something listens at {host}:{port}, so stop it or set MOECULE_PORT"):
        raise ConfigError(f"MOECULE_HOST is {host!r}: that is no address of this machine")


def _can_listen(host: str, port: int, taken: str) -> bool:
    """False if `host` is elsewhere. Raises ConfigError with the sentence `taken` if somebody listens there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"the host {host!r} cannot be found: {error.strerror}") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return False
            if error.errno == errno.EACCES:
                raise ConfigError(f"{host}:{port} may not be listened on: {error.strerror}") from None
            raise ConfigError(f"the port is taken: {taken}") from None
    return True


def shortfalls(settings: Settings, config: ModelConfig) -> Iterator[str]:
    """A sentence for each setting that counts for less than it says."""
    context, held = config.context_within(settings.max_context), settings.kv_pages * PAGE
    if settings.max_context > context:
        yield f"MOECULE_MAX_CONTEXT is {settings.max_context}: the model's own limit of {context} tokens holds"
    if 0 < held < context:
        yield f"MOECULE_KV_PAGES is {settings.kv_pages}: a request may have {held} tokens, not the context's {context}"
    if settings.experts_fp8 and (settings.device == "cpu" or not has_gpu()):
        yield "MOECULE_EXPERTS_FP8 is 1: that counts on a GPU alone"
