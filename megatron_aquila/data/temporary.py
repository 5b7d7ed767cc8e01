"""Names under which the files of a data set are written, and what is left of them when their writer was killed."""

import os
import re
from contextlib import suppress
from pathlib import Path


def temporary_path(prefix: str | os.PathLike[str], ending: str) -> Path:
    """``PREFIX.ENDING.<pid>.tmp``, which this process renames to ``PREFIX.ENDING`` when the file is whole."""
    return Path(f"{os.fspath(prefix)}.{ending}.{os.getpid()}.tmp")


def remove_leftovers(prefix: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files of ``prefix`` whose process is no longer alive on this machine; returns them."""
    folder, name = Path(prefix).parent, Path(prefix).name
    pattern = re.compile(re.escape(name) + r"\.(?:bin|idx|manifest\.json|meta\.jsonl)\.(\d+)\.tmp")
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is not None and not _alive(int(match[1])):
            with suppress(OSError):  # a folder that cannot be written is the writer's to report
                path.unlink()
                removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except PermissionError:  # somebody else's, so it is there
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
