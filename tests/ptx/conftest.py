"""Tests of compiled kernels run where nothing is interpreted: in the process that loads the plugin."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.pluginmanager.has_plugin("tests.ptx.plugin") else True
