"""What `unimoe_model` exports, and what importing it costs."""

import ast
import subprocess
import sys

import pytest

import unimoe_model


def type_checked_imports(root):
    """Public name -> module, as the imports for type checkers have it."""
    tree = ast.parse((root / "unimoe_model/__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: node.module.removeprefix("unimoe_model.")
        for node in block.body
        for alias in node.names
    }


def test_modules_are_those_that_type_checkers_see(root):
    assert type_checked_imports(root) == unimoe_model._MODULES
    assert sorted(unimoe_model.__all__) == sorted(unimoe_model._MODULES)


@pytest.mark.parametrize("name", unimoe_model.__all__)
def test_public_name_is_loaded_when_it_is_used(name):
    assert getattr(unimoe_model, name).__name__ == name
    assert name in dir(unimoe_model)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Answer'"):
        _ = unimoe_model.Answer


def test_import_loads_neither_torch_nor_transformers(root):
    code = (
        "import sys, unimoe_model; "
        "print(sorted({'torch', 'transformers', 'numpy', 'unimoe_kernels'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["unimoe_kernels", "unimoe_model"])
def test_package_is_typed(root, package):
    assert (root / package / "py.typed").is_file()
