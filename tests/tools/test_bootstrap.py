"""What tools/bootstrap.py decides; the installation itself is what made the environment these tests run in."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tools" / "bootstrap.py"
CPU_WHEEL = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0+cpu, 2.13.0, 2.12.1"
BOTH = "torch (2.15.0)\nAvailable versions: 2.15.0+cu130, 2.15.0, 2.13.0+cu130, 2.13.0+cu126, 2.13.0+cpu, 2.13.0"
NO_CPU_WHEEL = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0, 2.12.1"


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "enough"),
    [
        ("2.10.1", False),
        ("2.11.0a0+git1", False),
        ("2.11.0rc2", False),
        ("2.11.0+cu130", True),
        ("2.12.0a0+nv", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
    ],
)
def test_which_torch_will_do(bootstrap, version, enough):
    assert bootstrap.is_enough(version) is enough


def test_the_oldest_is_what_make_test_oldest_installs_and_setup_allows(bootstrap):
    oldest = "{}.{}".format(*bootstrap.TORCH_MINIMUM)
    makefile, setup = (PATH.parents[1].joinpath(name).read_text() for name in ("Makefile", "setup.py"))
    assert re.search(rf"^OLDEST \?= torch=={oldest}\.0 ", makefile, re.MULTILINE)
    assert f'"torch>={oldest}"' in setup


@pytest.mark.parametrize(
    ("listing", "build", "said"),
    [
        (CPU_WHEEL, "torch==2.13.0+cpu", "installing torch==2.13.0+cpu"),
        (BOTH, "torch==2.13.0+cpu", "installing torch==2.13.0+cpu"),
        ("torch (2.13.0+cpu)", "torch==2.13.0+cpu", "installing torch==2.13.0+cpu"),
        (NO_CPU_WHEEL, "torch==2.13.0", "2.7 GB"),
        ("torch (12.13.0+cpu)", "torch==2.13.0", "no CPU build is offered"),
        ("", "torch==2.13.0", "no CPU build is offered"),
    ],
)
def test_the_cpu_build_is_taken_or_a_large_download_announced(bootstrap, tmp_path, capsys, listing, build, said):
    (tmp_path / "listing").write_text(listing)
    assert bootstrap.choose_build(script(tmp_path / "python", f"cat {tmp_path}/listing")) == build
    assert said in capsys.readouterr().out


def test_torch_spec_is_taken_as_it_is(bootstrap, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_SPEC", "torch==2.13.0 --index-url 'file:///a b'")
    python = script(tmp_path / "python", f'printf "<%s>" "$@" >> {tmp_path}/told; echo 2.13.0')
    assert bootstrap.ensure_torch(python, tmp_path) == "2.13.0"
    assert "<torch==2.13.0><--index-url><file:///a b>" in (tmp_path / "told").read_text()
    assert "as TORCH_SPEC says" in capsys.readouterr().out


def test_another_python_is_refused(bootstrap, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "dev"])
    monkeypatch.setattr(bootstrap, "PYTHONS", ((3, 99),))
    with pytest.raises(SystemExit, match=r"Python 3\.11 or 3\.12 is needed"):
        bootstrap.main()


def test_a_missing_ensurepip_says_what_to_install(bootstrap, monkeypatch, tmp_path):
    class Broken:
        def __init__(self, **settings): ...

        def create(self, folder):
            raise OSError("no ensurepip")

    monkeypatch.setattr(bootstrap.venv, "EnvBuilder", Broken)
    with pytest.raises(SystemExit, match=r"apt install python3\.\d+-venv"):
        bootstrap.make_venv(tmp_path)


def test_a_failing_pip_ends_it(bootstrap, tmp_path):
    with pytest.raises(SystemExit, match="pip failed"):
        bootstrap.pip_install(script(tmp_path / "python", "exit 1"), "x")


def test_an_installation_without_torch_is_an_error(bootstrap, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_SPEC", "something-else")
    with pytest.raises(SystemExit, match=r"has no torch >= 2\.11"):
        bootstrap.ensure_torch(script(tmp_path / "python", "exit 0"), tmp_path)


def test_the_callers_packages_are_shared(bootstrap, tmp_path, monkeypatch):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["/somewhere", "/usr/lib/python3/dist-packages", "/home/x/site-packages"])
    bootstrap.share_packages(tmp_path)
    shared = (site / "shared-packages.pth").read_text()
    assert shared == "/usr/lib/python3/dist-packages\n/home/x/site-packages\n"


def test_nothing_is_done_twice(bootstrap, tmp_path, monkeypatch):
    (tmp_path / "installed-dev").write_text(bootstrap.fingerprint("dev"))
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--venv", str(tmp_path), "dev"])
    monkeypatch.setattr(bootstrap, "make_venv", lambda folder: pytest.fail("the environment is made again"))
    bootstrap.main()
    monkeypatch.setenv("TORCH_SPEC", "torch==2.12.1")
    assert bootstrap.fingerprint("dev") != (tmp_path / "installed-dev").read_text()
