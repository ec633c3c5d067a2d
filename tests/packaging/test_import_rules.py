"""Who may import whom, read from the syntax trees of both packages.

The rules are those of CONTRIBUTING.md: a kernel package that needs torch alone, operators that know
only themselves and the public functions of others, and a model on public names only.
"""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("unimoe_kernels", "unimoe_model")


class Import(NamedTuple):
    module: str
    names: tuple[str, ...]
    lazy: bool
    line: int

    @property
    def top(self):
        return self.module.split(".")[0]

    def targets(self):
        """`from a import b` may bring the module a.b or a name of a: both are listed."""
        return [self.module, *(f"{self.module}.{name}" for name in self.names)]


def imports_of(tree):
    """Lists the imports of a module; lazy ones are inside a function or under TYPE_CHECKING."""
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, (), lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = tuple(alias.name for alias in node.names)
            found.append(Import(node.module, names, lazy, node.lineno))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lazy = True
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(tree, False)
    return found


def files(pattern):
    return sorted(path for path in ROOT.glob(pattern) if "__pycache__" not in path.parts)


def violations(pattern, allowed):
    """Lists the imports of the files for which `allowed(path, import)` does not hold."""
    paths = files(pattern)
    assert paths, f"no file matches {pattern}"
    return [
        f"{path.relative_to(ROOT)}:{item.line} imports {item.module} {item.names or ''}"
        for path in paths
        for item in imports_of(ast.parse(path.read_text()))
        if not allowed(path, item)
    ]


def needs_triton(path):
    """Whether it is a module of Triton kernels, or of what launches several or tunes them."""
    is_kernel = path.name.startswith("kernel") or path.name == "fused.py"
    tunes = path.parent.name == "tune" and not path.name.startswith("__")
    return is_kernel or tunes or path.parent.name == "_triton"


def is_stdlib(item):
    return item.top in sys.stdlib_module_names


def public_names(package="unimoe_kernels"):
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package}/__init__.py has no literal __all__")


def module_graph(pattern):
    """The modules of the files -> those among them that each imports, lazily or not."""
    names = {}
    for path in files(pattern):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def modules_in(item):
        found = {f"{item.module}.{name}" for name in item.names} & names.keys()
        # What is no module is a name of the one that it is imported from.
        return found if len(found) == len(item.names) > 0 else found | {item.module} & names.keys()

    return {
        name: {
            target
            for item in imports_of(ast.parse(path.read_text()))
            for target in modules_in(item)
        }
        for name, path in names.items()
    }


def test_imports_of_finds_every_form():
    tree = ast.parse(
        "import a.b\nfrom c import d\ndef f():\n    import e\nif TYPE_CHECKING:\n    import g\n"
    )
    found = [(item.module, item.names, item.lazy) for item in imports_of(tree)]
    assert found == [
        ("a.b", (), False),
        ("c", ("d",), False),
        ("e", (), True),
        ("g", (), True),
    ]


@pytest.mark.parametrize("name", ["reference", "plain", "losses"])
def test_references_import_torch_only(name):
    def allowed(path, item):
        shared = item.module == f"unimoe_kernels.ops.{path.parent.name}.losses"
        return is_stdlib(item) or item.top == "torch" or shared

    assert not violations(f"unimoe_kernels/ops/*/{name}.py", allowed)


@pytest.mark.parametrize("pattern", ["ops/*/kernel*.py", "_triton/*.py"])
def test_kernels_import_triton_torch_and_what_kernels_share(pattern):
    def allowed(path, item):
        shared = f"{item.module}.".startswith("unimoe_kernels._triton.")
        return is_stdlib(item) or item.top in ("torch", "triton") or shared

    assert not violations(f"unimoe_kernels/{pattern}", allowed)


STEPS = ("arguments", "pipeline")


def test_fused_operators_import_kernels():
    def allowed(path, item):
        kernels = item.module.startswith("unimoe_kernels.ops.") and all(
            name.startswith("kernel") for name in item.names
        )
        own = f"unimoe_kernels.ops.{path.parent.name}"
        parts = {own, own.removesuffix("_quantized")}
        steps = item.module in {f"{part}.{name}" for part in parts for name in STEPS}
        choice = item.module == "unimoe_kernels" and item.names == ("_backends",)
        return is_stdlib(item) or item.top == "torch" or kernels or steps or choice

    assert not violations("unimoe_kernels/ops/*/fused.py", allowed)


def test_ops_import_their_own_parts_and_public_functions():
    """A kernel module needs triton, so op.py loads it inside the function that launches it."""
    shared = {"unimoe_kernels", "unimoe_kernels._backends", "unimoe_kernels._checks"}

    def allowed(path, item):
        own = f"unimoe_kernels.ops.{path.parent.name}"
        if is_stdlib(item) or item.top == "torch":
            return True
        if item.module == own:
            lazy = {"kernel", "kernel_backward", "fused"} if item.lazy else set()
            return (
                set(item.names)
                <= {"reference", "plain", "composition", "packed", "compiled"} | lazy
            )
        if item.module in (f"{own}.arguments", f"{own}.checks", f"{own}.pipeline"):
            return True
        # What an operator over quantised weights has in common with the one over floats.
        floats = own.removesuffix("_quantized")
        if item.module in (f"{floats}.arguments", f"{floats}.checks"):
            return True
        if item.module.startswith("unimoe_kernels.quantization."):
            return True
        if item.module == "unimoe_kernels":
            return set(item.targets()) <= shared
        if item.module == "unimoe_kernels.ops" and item.names == ("cuda_matmul",):
            return True
        is_other_op = item.module.startswith("unimoe_kernels.ops.") and item.module.endswith(".op")
        return is_other_op and not any(name.startswith("_") for name in item.names)

    assert not violations("unimoe_kernels/ops/*/op.py", allowed)


def test_formats_import_torch_and_checks():
    def allowed(path, item):
        own = item.module.startswith("unimoe_kernels.quantization.")
        checks = item.module == "unimoe_kernels" and item.names == ("_checks",)
        return is_stdlib(item) or item.top == "torch" or own or checks

    assert not violations("unimoe_kernels/quantization/*.py", allowed)


def test_layers_import_public_ops():
    exported = set()
    for item in imports_of(ast.parse((ROOT / "unimoe_kernels/ops/__init__.py").read_text())):
        exported |= set(item.names)

    def allowed(path, item):
        if is_stdlib(item) or item.top == "torch":
            return True
        if item.module == "unimoe_kernels.ops":
            return set(item.names) <= exported
        checks = item.module == "unimoe_kernels" and item.names == ("_checks",)
        renamed = item.module == "unimoe_kernels._renamed"
        formats = item.module.startswith("unimoe_kernels.quantization.")
        return checks or renamed or formats or item.module.startswith("unimoe_kernels.layers")

    assert not violations("unimoe_kernels/layers/*.py", allowed)


def test_dispatch_imports_layers_ops_and_running():
    def allowed(path, item):
        if is_stdlib(item) or item.top == "torch":
            return True
        if item.module == "safetensors" or item.module == "safetensors.torch":
            return item.lazy
        parts = ("unimoe_kernels.ops", "unimoe_kernels.layers")
        of_experts = ("expert_lora", "quantized_projection")
        return (
            item.module in parts
            or item.module in {f"unimoe_kernels.layers.{name}" for name in of_experts}
            or item.module.startswith("unimoe_kernels.distributed.dispatch.")
            or item.module.startswith("unimoe_kernels.distributed.running.")
            or (item.module == "unimoe_kernels" and item.names == ("_checks",))
            or item.module == "unimoe_kernels._files"
        )

    assert not violations("unimoe_kernels/distributed/dispatch/**/*.py", allowed)


def test_running_imports_torch_and_its_own_modules():
    """It knows ranks and files, and neither experts nor rows."""

    def allowed(path, item):
        own = item.module.startswith("unimoe_kernels.distributed.running.")
        return (
            is_stdlib(item) or item.top == "torch" or own or item.module == "unimoe_kernels._files"
        )

    assert not violations("unimoe_kernels/distributed/running/**/*.py", allowed)


def test_distributed_itself_only_exports_its_parts():
    def allowed(path, item):
        return item.module.startswith(
            ("unimoe_kernels.distributed.dispatch.", "unimoe_kernels.distributed.running.")
        )

    assert not violations("unimoe_kernels/distributed/*.py", allowed)


@pytest.mark.parametrize("pattern", ["unimoe_kernels/**/*.py", "unimoe_model/**/*.py"])
def test_modules_form_no_circle(pattern):
    graph = module_graph(pattern)
    assert any(graph.values())
    TopologicalSorter(graph).prepare()


def test_kernel_package_imports_nothing_but_torch_when_loaded():
    """Triton, transformers, peft and the rest come in lazily, or in a kernel.py."""

    def allowed(path, item):
        if item.lazy or needs_triton(path):
            return item.top != "unimoe_model"
        return is_stdlib(item) or item.top in ("torch", "unimoe_kernels")

    assert not violations("unimoe_kernels/**/*.py", allowed)


def test_kernel_modules_are_loaded_lazily_everywhere():
    def allowed(path, item):
        if item.lazy or needs_triton(path):
            return True
        return not any(
            target.startswith("unimoe_kernels._triton")
            or re.fullmatch(r"unimoe_kernels\.ops\..*\.(kernel\w*|fused)", target)
            for target in item.targets()
        )

    assert not violations("unimoe_kernels/**/*.py", allowed)


def test_nothing_imports_the_tuning_of_tiles():
    def allowed(path, item):
        return path.parent.name == "tune" or not any(
            target.startswith("unimoe_kernels.tune") for target in item.targets()
        )

    assert not violations("unimoe_*/**/*.py", allowed)


def test_model_imports_public_names_of_the_kernel_package():
    public = {
        package.replace("/", "."): public_names(package)
        for package in ("unimoe_kernels", "unimoe_kernels/distributed")
    }

    def allowed(path, item):
        if item.top != "unimoe_kernels":
            return True
        return set(item.names) <= public.get(item.module, set()) and bool(item.names)

    assert not violations("unimoe_model/**/*.py", allowed)


@pytest.mark.parametrize("package", OURS)
def test_packages_import_no_tests_or_benchmarks(package):
    def allowed(path, item):
        return item.top not in ("tests", "benchmarks", "pytest")

    assert not violations(f"{package}/**/*.py", allowed)


def test_no_utils_module():
    assert not [path for package in OURS for path in files(f"{package}/**/utils.py")]


def test_import_brings_in_neither_triton_nor_transformers():
    code = (
        "import sys, unimoe_kernels; "
        "print(sorted({'triton', 'transformers', 'peft', 'einops'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
