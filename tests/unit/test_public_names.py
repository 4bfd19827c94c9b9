"""The names that the package offers: all can be imported from it, and `dir` lists them and nothing else."""

import ast
import importlib
import subprocess
import sys

import pytest

import tiered_kv
from tests.sources import package_modules

PACKAGE = next(module for module in package_modules() if module.name == "tiered_kv")


@pytest.mark.parametrize("name", tiered_kv.__all__)
def test_every_public_name_can_be_imported_from_the_package(name):
    found = getattr(tiered_kv, name)
    module = tiered_kv._LATER.get(name)
    assert module is None or found is getattr(importlib.import_module(module), name)


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    """The imports under `TYPE_CHECKING` and the table behind `__getattr__` name the same modules."""
    typed = {
        alias.name: node.module
        for block in PACKAGE.tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    del typed["Clock"]  # only named in a signature
    assert typed == tiered_kv._LATER
    assert list(tiered_kv.__all__) == sorted(tiered_kv.__all__)


@pytest.mark.parametrize("module", ["monitoring", "persistence"])
def test_the_package_offers_the_classes_and_functions_of_its_doors(module):
    results_only = {"CheckpointResult", "LoadResult"}  # records that calls return; nobody makes one
    assert set(importlib.import_module(f"tiered_kv.{module}").__all__) - results_only <= set(tiered_kv.__all__)


def test_dir_lists_the_public_names_and_nothing_else():
    code = """
import sys, tiered_kv, tiered_kv.blocks, tiered_kv.tools.simulate
from tiered_kv import MetricsExporter
from tiered_kv import load_cache_checkpoint
from tiered_kv import save_cache_checkpoint
listed = dir(tiered_kv)
assert [name for name in listed if not name.startswith("__")] == sorted(tiered_kv.__all__), listed
assert {"__all__", "__doc__", "__version__", "__path__"} <= set(listed)
assert tiered_kv.blocks is sys.modules["tiered_kv.blocks"] and tiered_kv.tools.simulate and tiered_kv.library
try:
    tiered_kv.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
