"""The wheel: built from a copy of the tree without any network, it holds one package, whole, with the linked folders as files."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.sources import LINKED, ROOT, package_modules, project_files


def copy_of_the_tree(place: Path) -> Path:
    """What a fresh clone would have, and what is about to be committed; links stay links."""
    for path in project_files():
        target = place / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    return place


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The built wheel, open."""
    tree, out = copy_of_the_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    built = subprocess.run([*command, "--wheel-dir", str(out), str(tree)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_its_only_top_level_name_is_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"tiered_kv"}
    assert len(tops) == 2


def test_every_module_is_inside(wheel):
    """The list of packages in pyproject.toml is explicit, so a new folder can be forgotten there."""
    expected = {
        f"{module.name.replace('.', '/')}{'/__init__.py' if module.path.stem == '__init__' else '.py'}" for module in package_modules()
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folders_are_real_files(wheel, folder):
    for path in (ROOT / folder).glob("*.py"):
        entry = wheel.getinfo(f"tiered_kv/{folder}/{path.name}")
        assert entry.external_attr >> 16 & 0o170000 != 0o120000, "a link"
        assert wheel.read(entry) == path.read_bytes()


def test_the_demos_documents_are_inside(wheel):
    documents = [path for path in (ROOT / "tiered_kv" / "tools" / "demo" / "documents").iterdir() if path.is_file()]
    assert documents
    for path in documents:
        assert wheel.read(f"tiered_kv/tools/demo/documents/{path.name}") == path.read_bytes()


def test_the_command_is_inside(wheel):
    (entries,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "tiered-kv = tiered_kv.cluster.commands.cli:main" in wheel.read(entries).decode()


def test_the_license_is_inside(wheel):
    (place,) = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert wheel.read(place) == (ROOT / "LICENSE").read_bytes()
