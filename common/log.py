"""Logs: one line an event on stderr, readable or JSON. Never a prompt, a token or a secret."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from common.settings import Settings

Logger = structlog.stdlib.BoundLogger


def setup_logs(settings: Settings) -> None:
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    renderer: Any = structlog.processors.JSONRenderer()
    times = structlog.processors.TimeStamper(fmt="iso", utc=True)
    if not settings.log_json:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
        times = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            times,
            structlog.processors.StackInfoRenderer(),
            *([structlog.processors.format_exc_info] if settings.log_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # Libraries log through the standard library; they speak up only when something is wrong.
    logging.getLogger("asyncio").addFilter(_is_news)
    logging.basicConfig(level=max(level, logging.WARNING), format="%(asctime)s [%(levelname)s] %(name)s: %(message)s")


def _is_news(record: logging.LogRecord) -> bool:
    """Not what the streams of asyncio's own make it say of every connection with TLS that its peer closes."""
    return "returning true from eof_received() has no effect" not in str(record.msg)


def actor_log(kind: str, actor_id: str) -> Any:
    return structlog.get_logger("actor").bind(kind=kind, id=actor_id)
