"""Metrics of the server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)


class Metrics:
    """Counters of one server.

    Args:
        in_flight: number of requests at work or waiting.
        loaded: number of models in memory.
    """

    def __init__(self, in_flight: Callable[[], int], loaded: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        names = ["method", "route", "status"]
        self._requests = Counter(
            "sightloop_requests", "Requests, by route and HTTP status", names, registry=self.registry
        )
        self._seconds = Histogram(
            "sightloop_request_seconds",
            "Time from the first byte of a request to the end of its answer",
            ["route"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
        )
        self._items = Histogram(
            "sightloop_batch_items",
            "Images or texts computed together",
            ["verb"],
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self._batch_seconds = Counter(
            "sightloop_batch_seconds", "Time that batches took", ["verb"], registry=self.registry
        )
        gauges = {
            "sightloop_requests_in_flight": ("Requests at work or waiting", in_flight),
            "sightloop_models_loaded": ("Models in memory", loaded),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, verb: str, items: int, seconds: float) -> None:
        """Counts a batch."""
        self._items.labels(verb).observe(items)
        self._batch_seconds.labels(verb).inc(seconds)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self.registry)
