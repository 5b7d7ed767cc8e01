"""Names under which the files of a data set are written."""

import os
from pathlib import Path


def temporary_path(prefix: str | os.PathLike[str], ending: str) -> Path:
    """``PREFIX.ENDING.<pid>.tmp``, which this process renames to ``PREFIX.ENDING`` when the file is whole."""
    return Path(f"{os.fspath(prefix)}.{ending}.{os.getpid()}.tmp")
