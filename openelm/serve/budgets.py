"""What the holder of a key may use: requests and tokens a minute, and choices at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from openelm.errors import ConfigError
from openelm.serve.refusal import Refusal, over_budget

_MINUTE = 60 * 10**9  # in nanoseconds
_MOST = 10**9


@dataclass(frozen=True)
class Budget:
    """What each key may use; None: as much as the server has.

    Attributes:
        requests_per_minute: of those that ask for text; one request counts once, whatever it asks for.
        tokens_per_minute: of prompts and of all choices that are generated.
        concurrent: choices that wait or are being made.
        clock: tells nanoseconds; tests move it by hand.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    clock: Callable[[], int] = time.monotonic_ns

    def __post_init__(self) -> None:
        for what, value in (
            ("--key-requests-per-minute", self.requests_per_minute),
            ("--key-tokens-per-minute", self.tokens_per_minute),
            ("--key-concurrent", self.concurrent),
        ):
            if value is not None and not 1 <= value <= _MOST:
                raise ConfigError(
                    f"{what} {value} is not between 1 and {_MOST}",
                    fix="choose another number, or leave the option out for no limit",
                )


class Bucket:
    """Holds a minute's units and fills evenly; it can be overdrawn, and then has to fill up to nothing first.

    One number says how full it is: when it will be full, in nanoseconds times the rate. It is whole, so that no wait
    that is told is too short or too long.
    """

    def __init__(self, per_minute: int, clock: Callable[[], int]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._full_at = self._now()

    def take(self, units: int) -> None:
        """Take units, whether they are there or not."""
        self._full_at = max(self._full_at, self._now()) + units * _MINUTE

    def give_back(self, units: int) -> None:
        """Undo a `take`."""
        self._full_at -= units * _MINUTE

    @property
    def left(self) -> int:
        """Whole units that are there."""
        return max(0, self.per_minute - -(-self._missing() // _MINUTE))

    @property
    def until_one_ns(self) -> int:
        """How long until there is a whole unit."""
        return max(0, -(-(self._missing() - (self.per_minute - 1) * _MINUTE) // self.per_minute))

    @property
    def until_full_ns(self) -> int:
        """How long until it is full."""
        return -(-self._missing() // self.per_minute)

    def _now(self) -> int:
        return self._clock() * self.per_minute

    def _missing(self) -> int:
        return max(0, self._full_at - self._now())


class Account:
    """What one key has used; lives on the event loop, and takes the same memory however much that is."""

    def __init__(self, budget: Budget) -> None:
        self._buckets = {
            unit: Bucket(per_minute, budget.clock)
            for unit, per_minute in (("requests", budget.requests_per_minute), ("tokens", budget.tokens_per_minute))
            if per_minute is not None
        }
        self._concurrent, self._held = budget.concurrent, 0

    @contextmanager
    def request(self) -> Iterator[Admitted]:
        """Let a request in while anything is left of every budget, and count it, unless it is refused for want of room.

        Tokens are not asked for ahead, as nobody knows how many there will be: they are taken as they are made, and
        what is overdrawn has to come back before the next request.

        Raises:
            Refusal: 429, a budget is used up.
        """
        waits = {unit: bucket.until_one_ns for unit, bucket in self._buckets.items() if bucket.until_one_ns}
        if waits:
            unit = max(waits, key=waits.__getitem__)
            raise over_budget(f"the {self._buckets[unit].per_minute} {unit} a minute of this key", waits[unit])
        admitted = Admitted(self)
        admitted.hold(1)
        self._take("requests", 1)
        try:
            yield admitted
        except Refusal as refusal:
            if refusal.status == 429 and "requests" in self._buckets:
                self._buckets["requests"].give_back(1)
            raise
        finally:
            self._held -= admitted.held

    def take_tokens(self, tokens: int) -> None:
        """Count tokens that were read or made."""
        self._take("tokens", tokens)

    def headers(self) -> dict[str, str]:
        """Say what is left, in OpenAI's headers."""
        return {
            f"x-ratelimit-{name}-{unit}": value
            for unit, bucket in self._buckets.items()
            for name, value in (
                ("limit", str(bucket.per_minute)),
                ("remaining", str(bucket.left)),
                ("reset", _duration(-(-bucket.until_full_ns // 10**6))),
            )
        }

    def hold(self, choices: int, of_request: int) -> None:
        """Keep places; see `Admitted.hold`."""
        most = self._concurrent
        if most is not None and of_request > most:  # waiting would not help
            raise Refusal(
                400,
                f"the request is for {of_request} choices, and a key may have {most} at once; ask for fewer",
                code="invalid_value",
            )
        if most is not None and self._held + choices > most:
            raise over_budget(f"the {most} choices at once of this key", 10**9)
        self._held += choices

    def _take(self, unit: str, units: int) -> None:
        if unit in self._buckets:
            self._buckets[unit].take(units)


class Admitted:
    """A request that is being answered, with the choices it holds of its key's."""

    def __init__(self, account: Account) -> None:
        self._account, self.held = account, 0

    def hold(self, choices: int) -> None:
        """Hold so many choices in all, until the answer is written.

        Raises:
            Refusal: 429, the key has too many; 400, it may never have so many.
        """
        self._account.hold(choices - self.held, choices)
        self.held = choices


class Budgets:
    """The accounts of all keys.

    Without keys there is one account for all callers: the server then listens to its own machine alone, where all have
    the same address, or as many as they like.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._accounts: dict[str, Account] = {}

    def of(self, scope: str) -> Account:
        """Return the account of a key; `scope` comes from `Access.check`, so that there are no more than keys."""
        if scope not in self._accounts:
            self._accounts[scope] = Account(self._budget)
        return self._accounts[scope]


def _duration(milliseconds: int) -> str:
    """Write a time as OpenAI does, such as 0s, 120ms, 1.5s and 6m0s."""
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
