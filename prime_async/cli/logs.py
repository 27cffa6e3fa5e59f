"""Logging: the library only speaks, the command decides where to and in which form."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure_logging(form: str, level: str) -> None:
    """Log to stderr, as lines for people (``console``) or as JSON lines (``json``), from ``level`` upwards."""
    renderer: Any
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=form == "json"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
