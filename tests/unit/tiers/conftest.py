"""Asserts that every test of a tier ends with as many open files as at its start."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_leaked_files():
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before
