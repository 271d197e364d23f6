"""Try again after a fault that may pass: an I/O error of a disk, a broken or slow connection. Nothing else."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

TRIES = 3
WAIT_SECONDS = 0.2  # before the second try; four times as long before the third
_ERRNOS = {
    errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETRESET,
}  # fmt: skip
_NETWORK_PACKAGES = {"aiohttp", "botocore", "aiobotocore", "urllib3"}
_TOO_MANY_REQUESTS = 429

T = TypeVar("T")


def may_pass(error: BaseException) -> bool:
    """Tell whether an error is an I/O error, a connection's, or a server's own (5xx); a refusal or absence is not."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status >= 500 or status == _TOO_MANY_REQUESTS
    if any(kind.__module__.partition(".")[0] in _NETWORK_PACKAGES for kind in type(error).__mro__):
        return True
    return isinstance(error, OSError) and error.errno in _ERRNOS


def wait_to_retry(error: BaseException, failures: int) -> bool:
    """Wait and return True when one more try is due after so many failures; False: give up."""
    if failures >= TRIES or not may_pass(error):
        return False
    time.sleep(WAIT_SECONDS * 4 ** (failures - 1))
    return True


def retried(call: Callable[[], T]) -> T:
    """Return what a call returns; up to three tries while its errors are ones that may pass."""
    failures = 0
    while True:
        try:
            return call()
        except Exception as error:
            failures += 1
            if not wait_to_retry(error, failures):
                raise
