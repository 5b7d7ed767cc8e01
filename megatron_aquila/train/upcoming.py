"""The digest of the samples that come next: a run that continues reads what the one before it would have read."""

import hashlib

from megatron_aquila.data.samples import SampleSource
from megatron_aquila.errors import CheckpointError
from megatron_aquila.train.state import Upcoming

NUM_SAMPLES = 128  # enough to tell another order, document or tokenizer; a few milliseconds, whatever the batch


def upcoming(source: SampleSource, start: int) -> Upcoming:
    """The next samples from ``start`` on, as far as there are any. Reads them; local."""
    stop = min(start + NUM_SAMPLES, len(source))
    return Upcoming(start, max(start, stop), digest(source, start, stop))


def digest(source: SampleSource, start: int, stop: int) -> str:
    """BLAKE2b of the token ids of the samples from ``start`` to ``stop``, each as 8 bytes, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for number in range(start, stop):
        found.update(source[number].tokens.astype("<i8").tobytes())
    return found.hexdigest()


def check_upcoming(saved: Upcoming, source: SampleSource, *, override: bool) -> str:
    """Compare the checkpoint's digest with that of the same samples here; a line that says both.

    Raises ``CheckpointError`` where they differ, unless ``override``.
    """
    if saved.start == saved.stop:
        return "no sample came next when the checkpoint was made"
    found = digest(source, saved.start, min(saved.stop, len(source)))
    what = f"the next samples, {saved.start}-{saved.stop - 1}"
    if found == saved.digest:
        return f"{what}: digest {found}, as in the checkpoint"
    differ = f"{what}: digest {saved.digest} in the checkpoint, {found} here"
    if override:
        return f"{differ}; --override-data says that it is meant"
    raise CheckpointError(
        f"{differ}: the data was changed, or is cut or ordered in another way, so that samples would be seen twice or "
        "never; give back what the run read, or --override-data if it is meant"
    )
