"""Metrics: every actor has a registry of its own, and answers GetMetrics with its text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from common.messages import Metrics


def new_registry(kind: str, actor_id: str, boot_id: str) -> CollectorRegistry:
    registry = CollectorRegistry()
    info = Gauge("moecule_actor_info", "1, with which actor this is", ["kind", "id", "boot_id"], registry=registry)
    info.labels(kind, actor_id, boot_id).set(1)
    return registry


def render(registry: CollectorRegistry) -> Metrics:
    return Metrics(text=generate_latest(registry).decode())
