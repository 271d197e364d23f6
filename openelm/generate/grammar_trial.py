"""The child process that tries a grammar; started by path, so that it imports nothing of ours.

It compiles what stands on its standard input for a vocabulary of bytes, and ends well unless that killed it. Whether
the grammar is right is for the parent to say.
"""

from __future__ import annotations

import resource
import sys
import threading
from types import SimpleNamespace

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

_CPU_SECONDS = 2  # an object of 1,000 optional properties takes 0.06, an enumeration of 64 KiB 0.01
_MEMORY_BYTES = 1 << 30
_STACK_BYTES = 2 << 20  # a quarter of what the parent's threads have


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    grammar = sys.stdin.read()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_compile, args=(grammar,))
    thread.start()
    thread.join()


def _compile(grammar: str) -> None:
    table = [*(bytes([byte]) for byte in range(256)), b""]
    description = SimpleNamespace(tokens=table, eos_token_id=256, bos_token_id=None, special_token_ids=[256])
    LLMatcher(LLTokenizer(TokenizerWrapper(description)), grammar, log_level=0).compute_bitmask()


if __name__ == "__main__":
    main()
