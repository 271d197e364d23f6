"""The published filters (OpenELM, arXiv:2404.14619, section 3.1): too few characters, too few tokens."""

from __future__ import annotations

import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PREFIX_CHARACTERS = 2


def normalize(text: str) -> str:
    """Lower the case, strip ASCII punctuation and join words by single spaces, as SlimPajama does."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def character_filter(text: str, min_characters: int) -> str | None:
    """Name the reason to drop a document before it is tokenised, or None to keep it."""
    if not text or text.isspace():
        return "empty"
    # A prefix never normalises to more than the whole, so long documents are seldom normalised whole.
    prefix = text[: _PREFIX_CHARACTERS * min_characters]
    if len(normalize(prefix)) >= min_characters or len(normalize(text)) >= min_characters:
        return None
    return "too_few_characters"


def token_filter(length_tokens: int, min_tokens: int) -> str | None:
    """Name the reason to drop a tokenised document (its length counts BOS and EOS), or None to keep it."""
    return "too_few_tokens" if length_tokens < min_tokens else None
