"""Python's garbage that refers to itself: collected between steps, after the same ones on every rank."""

import gc


class Garbage:
    """Collects every ``interval`` steps from ``begin`` to ``close``, and Python does not; 0 leaves it to Python.

    Python collects whenever enough objects were made: on each rank in the middle of another step, where all others wait
    for it. A step makes no garbage of this kind, so that none of its tensors has to wait for a collection. Nothing is
    communicated.
    """

    def __init__(self, *, interval: int) -> None:
        self._interval = interval
        self._was_enabled = self._has_frozen = False

    def begin(self) -> None:
        """Collect once, and look no more at what the set-up has made: it stays as long as the run."""
        if self._interval == 0:
            return
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        if gc.get_freeze_count() == 0:  # it would be thawed with ours
            self._has_frozen = True
            gc.freeze()

    def after(self, step: int) -> None:
        """Collect where it is due after ``step``."""
        if self._interval > 0 and step % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        """Leave it to Python as before."""
        if self._has_frozen:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()
