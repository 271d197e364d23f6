"""Interleave sources by their weights in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence


def choose_source(tokens: Sequence[int], weights: Sequence[float], lane: int, longest: int) -> int:
    """Choose the source of a lane's next document, so that each stays within one document of its exact share.

    Of the sources that are not ahead of their share of the tokens so far, take the one that would soonest fall a
    longest document behind. This is WF2Q (Bennett and Zhang, 1996, doi:10.1109/INFCOM.1996.497885) for documents whose
    lengths are not known before they are read. Ties go round by lane, so that lanes do not all begin with one source.

    Args:
        tokens: of each source so far, in whole documents.
        longest: tokens of the lane's longest document so far.
    """
    count = len(tokens)
    if count < 3:  # any rule that takes one that is behind; written so that ties round as they always have
        return min(range(count), key=lambda index: (tokens[index] / weights[index], (index - lane) % count))
    total, whole = sum(tokens), math.fsum(weights)
    behind = [total * weight / whole - taken for taken, weight in zip(tokens, weights, strict=True)]
    rounding = total * 1e-12  # all behind sum to zero, so one is not below it but for rounding
    ready = [index for index in range(count) if behind[index] >= -rounding]
    return min(ready, key=lambda index: ((longest - behind[index]) / weights[index], (index - lane) % count))
