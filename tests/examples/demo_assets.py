"""Skips tests where packages that carry weights or data of the demo are missing."""

from importlib.util import find_spec

import pytest


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"demo assets are not installed: {', '.join(missing)}"
    )
