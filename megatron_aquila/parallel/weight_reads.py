"""Word of a weight that backward is about to read: where weights are sharded, it may not be there."""

from collections.abc import Callable

from torch import nn


class WeightReads:
    """Passes on, before a linear's backward reads its weight, that it will. Forward's reads are a module's to announce.

    By default nobody listens. What is communicated is the listener's.
    """

    def __init__(self) -> None:
        self._listener: Callable[[nn.Parameter], None] | None = None

    def announce_to(self, listener: Callable[[nn.Parameter], None]) -> None:
        """From here on ``listener`` is called with each weight; it returns once the weight may be read."""
        self._listener = listener

    def announce(self, weight: nn.Parameter) -> None:
        """``weight`` is read next."""
        if self._listener is not None:
            self._listener(weight)
