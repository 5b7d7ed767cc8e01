"""Every planted damage is found and named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_aquila.checkpoint.integrity import examine, glance
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from tests.checkpoint.numbers import FILE, flip, forge, save_numbers


def test_what_was_written_is_whole(tmp_path: Path) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)
    assert glance(folder) == examine(folder) == []


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)
    for file in (FILE, "manifest.json"):
        path = folder / file
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            flip(path, at)
            problems = examine(folder)
            assert problems or path.read_text().split() == whole.decode().split(), f"{file}: byte {at}"
            assert all(file in problem for problem in problems)
        path.write_bytes(whole)
    assert examine(folder) == []


Damage = Callable[[Path], object]


def shrink(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGES: dict[str, tuple[Damage, str, bool]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: it cannot be read", True),
    "no file": (lambda folder: (folder / FILE).unlink(), f"{FILE}: it cannot be read: No such file", True),
    "short": (lambda folder: shrink(folder / FILE), f"{FILE}: it has .* bytes instead of", True),
    "a bit": (lambda folder: flip(folder / FILE, -1), f"{FILE}: it is damaged: its sha256 is", False),
    "a link": (
        lambda folder: (folder / FILE).rename(folder.parent / "x") and (folder / FILE).symlink_to(folder.parent / "x"),
        f"{FILE}: a link, which may lead anywhere",
        True,
    ),
    "a stray": (lambda folder: (folder / "more.bin").touch(), r"more\.bin: the manifest does not know it", False),
    "uncovered": (
        lambda folder: forge(folder, lambda body: body["tensors"]["weight"].update(shape=[7])),
        "weight: only 6 of its 7 elements are held",
        False,
    ),
    "another shape": (
        lambda folder: forge(
            folder, lambda body: body["tensors"]["other"].update(shape=[4, 1], pieces=[[FILE, [0, 0], [4, 1]]])
        ),
        r"other@0,0 is .*\(2, 2\)\) in it, .*\(4, 1\)\) in the table",
        False,
    ),
    "another name": (
        lambda folder: forge(folder, lambda body: body["tensors"].update(third=body["tensors"].pop("weight"))),
        "it holds no third@0",
        False,
    ),
    "a tensor too many": (
        lambda folder: forge(folder, lambda body: body["tensors"].pop("weight")),
        "the manifest does not know its weight@0",
        False,
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)
    inflict, message, at_a_glance = DAMAGES[damage]
    inflict(folder)
    assert bool(glance(folder)) == at_a_glance
    problems = "\n".join(examine(folder))
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(problems)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/b", "..", ".", "", "manifest.json", "a\\b", "..\\x", "x\0y", "é"]
)
def test_a_manifest_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)

    def redirect(body: dict[str, dict[str, dict[str, list[list[object]]]]]) -> None:
        body["files"][name] = body["files"].pop(FILE)
        for tensor in body["tensors"].values():
            for piece in tensor["pieces"]:
                piece[0] = name

    forge(folder, redirect)
    with pytest.raises(CheckpointError, match="is not the name of a file in its folder"):
        CheckpointReader(folder)


def test_a_file_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)
    (folder / FILE).rename(tmp_path / "elsewhere")
    (folder / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link, which may lead anywhere"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("files"),
        lambda body: body.update(files=[]),
        lambda body: body.update(step=-1),
        lambda body: body.update(step=True),
        lambda body: body.update(state=[]),
        lambda body: body.update(saved="now"),
        lambda body: body.update(saved=float("inf")),
        lambda body: body["files"][FILE].update(size=1.5),
        lambda body: body["files"][FILE].update(sha256="0" * 63),
        lambda body: body["tensors"]["weight"].update(shape=[]),
        lambda body: body["tensors"]["weight"].update(shape=[2**63]),
        lambda body: body["tensors"]["weight"].update(dtype="F8"),
        lambda body: body["tensors"]["weight"]["pieces"][0].__setitem__(0, "other.safetensors"),
        lambda body: body["tensors"]["weight"]["pieces"][0].__setitem__(1, [0, 0]),
        lambda body: body["tensors"]["weight"]["pieces"].append([]),
    ],
)
def test_a_forged_manifest_is_refused(change: Damage, tmp_path: Path) -> None:
    folder = save_numbers(tmp_path, 1, 1.0)
    forge(folder, change)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"manifest\.json: no run of ours wrote it"):
        CheckpointReader(folder)
