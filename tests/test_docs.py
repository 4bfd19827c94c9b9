"""The pages and the API reference are built without a warning; what the page of the library says in code is Python."""

import ast
import re
import subprocess
import sys

import pytest

from tests.sources import ROOT


def test_the_reference_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "models.html").read_text()
    assert "tiered_kv.library.model.TransformersKVCache.warmup" in page


def test_code_on_the_librarys_page_is_python():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        ast.parse(block)
