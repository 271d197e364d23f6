"""Numbers for Prometheus; none of them tells what was asked."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server.

    Args:
        active: counts slots in use.
        waiting: counts choices that wait for a slot.
    """

    def __init__(self, *, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        own = {"registry": self._registry, "namespace": "openelm"}
        self.requests = Counter("requests", "Answers, by route and HTTP status", ("route", "status"), **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **own)
        self.cached_tokens = Counter("cached_tokens", "Tokens of prompts that were found in the cache", **own)
        self.generated_tokens = Counter("generated_tokens", "Tokens generated", **own)
        self.cancelled = Counter("cancelled_requests", "Requests whose client left before the answer", **own)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the whole request to its first token", buckets=_SECONDS, **own
        )
        self.between_tokens = Histogram(
            "time_between_tokens_seconds", "From one token of a choice to its next", buckets=_SECONDS, **own
        )
        Gauge("active_slots", "Choices that are being made", **own).set_function(active)
        Gauge("waiting_choices", "Choices that wait for a slot", **own).set_function(waiting)

    def text(self) -> bytes:
        """Write all numbers in Prometheus' text format."""
        return generate_latest(self._registry)
