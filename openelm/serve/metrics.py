"""Numbers for Prometheus; none of them tells what was asked."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_NAMESPACE = "openelm"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server.

    Args:
        active: counts slots in use.
        waiting: counts choices that wait for a slot.
    """

    def __init__(self, *, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._count("requests", "Answers, by route and HTTP status", "route", "status")
        self.prompt_tokens = self._count("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._count("cached_tokens", "Tokens of prompts that were found in the cache")
        self.generated_tokens = self._count("generated_tokens", "Tokens generated")
        self.cancelled = self._count("cancelled_requests", "Requests whose client left before the answer")
        self.first_token = self._times("time_to_first_token", "From the whole request to its first token")
        self.between_tokens = self._times("time_between_tokens", "From one token of a choice to its next")
        self._show("active_slots", "Choices that are being made", active)
        self._show("waiting_choices", "Choices that wait for a slot", waiting)

    def _count(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, labels, namespace=_NAMESPACE, registry=self._registry)

    def _times(self, name: str, words: str) -> Histogram:
        return Histogram(f"{name}_seconds", words, namespace=_NAMESPACE, registry=self._registry, buckets=_SECONDS)

    def _show(self, name: str, words: str, value: Callable[[], float]) -> None:
        Gauge(name, words, namespace=_NAMESPACE, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Write all numbers in Prometheus' text format."""
        return generate_latest(self._registry)
