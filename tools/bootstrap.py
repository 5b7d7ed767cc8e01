"""Make the project's virtual environment and install the project in it; quick when there is nothing to do.

    python3 tools/bootstrap.py [--venv .venv] EXTRA

EXTRA is one of setup.py's extras: quickstart or dev. An installed torch >= 2.11 of the calling interpreter is used as
it is. Otherwise torch is installed first: TORCH_SPEC if set (anything that ``pip install`` takes), else torch==2.13.0,
as its CPU build where one is offered.
Whatever else is installed may not change it. Standard library only.
"""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ((3, 11), (3, 12))
TORCH_MINIMUM = (2, 11)
TORCH_DEFAULT = "torch==2.13.0"
CUDA_GB = 2.7  # torch 2.13.0 and its CUDA libraries for Python 3.11 on x86-64: the sum of what pip downloads


def installed_torch():
    """Version of the calling interpreter's torch, or None where there is none that the project can use."""
    import importlib.metadata  # here, so that a Python too old to have it is told so

    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if is_enough(version) else None


def is_enough(version):
    """Whether a torch of this version will do; a pre-release of the oldest one is too old."""
    public = version.partition("+")[0]
    release = tuple(int(number) for number in re.findall(r"\d+", public)[:2])
    is_pre_release = re.search(r"a|b|rc|dev", public) is not None
    return release > TORCH_MINIMUM or (release == TORCH_MINIMUM and not is_pre_release)


def make_venv(folder):
    """A virtual environment of the calling interpreter in ``folder``; one of another interpreter is made anew."""
    python = folder / "bin" / "python"
    probe = [str(python), "-c", "import pip, sys; print(sys.version)"]
    if python.exists() and subprocess.run(probe, capture_output=True, text=True).stdout.strip() == sys.version.strip():
        return python
    say(f"making a virtual environment of Python {sys.version.split()[0]} in {folder}")
    try:
        venv.EnvBuilder(clear=True, with_pip=True, symlinks=True).create(folder)
    except (subprocess.CalledProcessError, OSError) as error:
        name = "python{}.{}-venv".format(*sys.version_info[:2])
        sys.exit(f"bootstrap: no virtual environment: {error}; on Debian and Ubuntu: apt install {name}")
    return python


def share_packages(folder):
    """Let the environment see the calling interpreter's packages, after its own: torch and what torch needs."""
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    target = next((folder / "lib").glob("python*/site-packages")) / "shared-packages.pth"
    target.write_text("".join(f"{path}\n" for path in shared))


def choose_build(python):
    """What to install where TORCH_SPEC says nothing: exactly the CPU build, if the registry offers one.

    Else it is the default build, and it is said before its download begins how large that is.
    """
    listing = subprocess.run([python, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True)
    cpu_build = f"{TORCH_DEFAULT}+cpu"
    if cpu_build.removeprefix("torch==") in re.split(r"[\s,()]+", listing.stdout):
        say(f"installing {cpu_build}")
        return cpu_build
    say(f"installing {TORCH_DEFAULT}: no CPU build is offered, so pip takes the default one.")
    say(f"On x86-64 Linux that is {CUDA_GB} GB to download, CUDA libraries included, and more on disk.")
    say("Set TORCH_SPEC to choose another, for instance TORCH_SPEC='torch==2.13.0 --index-url URL_OF_CPU_WHEELS'.")
    return TORCH_DEFAULT


def ensure_torch(python, folder):
    """A torch that the project can use, the caller's or one in the environment; returns its version."""
    spec = os.environ.get("TORCH_SPEC")
    if spec is None and installed_torch() is not None:
        say(f"using the installed torch {installed_torch()} of {sys.executable}")
        share_packages(folder)
    elif spec is not None:
        say(f"installing torch as TORCH_SPEC says: {spec}")
        pip_install(python, *shlex.split(spec))
    elif torch_of(python) is None:
        pip_install(python, choose_build(python))
    version = torch_of(python)
    if version is None:
        sys.exit(f"bootstrap: {python} has no torch >= 2.11 after the installation; set TORCH_SPEC to one")
    return version


def torch_of(python):
    """Version of the environment's torch, or None where there is none that the project can use."""
    probe = [str(python), "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    found = subprocess.run(probe, capture_output=True, text=True)
    version = found.stdout.strip()
    return version if found.returncode == 0 and is_enough(version) else None


def pip_install(python, *arguments):
    """Run pip in the environment, its output and progress bars shown; its failure ends the program."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    say("$ " + shlex.join(command))
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit("bootstrap: pip failed; what it printed above says why")


def fingerprint(extra):
    """Changes whenever the installation may be out of date."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").glob("*"))]
    digest = hashlib.sha256(f"{extra} {sys.version} {installed_torch()} {os.environ.get('TORCH_SPEC')}".encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def say(text):
    """Print a line at once."""
    print(text, flush=True)


def main():
    """Check the interpreter, then install what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra", choices=["quickstart", "dev"], help="what the environment is for")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    options = parser.parse_args()
    if sys.version_info[:2] not in PYTHONS:
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"bootstrap: Python 3.11 or 3.12 is needed, {sys.executable} is {version}; try make PYTHON=python3.11")
    folder = options.venv.absolute()
    stamp = folder / f"installed-{options.extra}"
    wanted = fingerprint(options.extra)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = make_venv(folder)
    constraint = folder / "torch.txt"
    constraint.write_text(f"torch=={ensure_torch(python, folder)}\n")
    pip_install(python, "--constraint", str(constraint), "--editable", f".[{options.extra}]")
    stamp.write_text(wanted)
    say(f"ready: {python}")


if __name__ == "__main__":
    main()
