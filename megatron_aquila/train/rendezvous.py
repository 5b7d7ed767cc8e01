"""Which attempt is this? After a restart the store still holds the dead processes' keys."""

import json
import time
import uuid
from datetime import timedelta
from typing import Protocol


class Store(Protocol):
    """What is needed of ``torch.distributed.Store``: keys and values of text."""

    def set(self, key: str, value: str) -> None:
        """Write ``value``."""
        ...

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all ``keys`` are there."""
        ...


def agree_on_attempt(store: Store, *, rank: int, world_size: int, timeout: timedelta) -> str:
    """An id that exactly the living processes of this attempt share. Raises ``TimeoutError``.

    torchrun's restart count cannot serve: each node's agent has its own, and only the one whose worker failed counts
    up. So rank 0 makes an id, and every rank makes a word of its own: whoever finds that word beside an id knows that
    the id was written after it came, hence by the rank 0 of this attempt.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"word/{rank}", word)
    if rank > 0:
        attempt = ""
        while attempt == "":
            _wait(deadline, f"rank {rank} was not greeted by rank 0")
            if store.check([f"greeting/{rank}"]):
                greeting = json.loads(store.get(f"greeting/{rank}"))
                attempt = greeting["attempt"] if greeting["word"] == word else ""
        store.set(f"answer/{rank}", attempt)
        return attempt
    missing = set(range(1, world_size))
    while missing:
        _wait(deadline, f"ranks {sorted(missing)[:8]} did not come")
        for other in sorted(missing):
            if store.check([f"word/{other}"]):
                greeting = {"attempt": word, "word": store.get(f"word/{other}").decode()}
                store.set(f"greeting/{other}", json.dumps(greeting))
            if store.check([f"answer/{other}"]) and store.get(f"answer/{other}").decode() == word:
                missing.discard(other)
    return word


def _wait(deadline: float, why: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{why} before the timeout; is one of the nodes down?")
    time.sleep(0.02)
