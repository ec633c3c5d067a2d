"""Every operator, every module of kernels and every kernel has examples by which it is tested."""

import cases
import pytest
import registry

OPS = cases.operators()


@pytest.mark.parametrize("op", OPS)
def test_every_operator_has_cases(op):
    module = cases.of(op)
    assert module is not None, f"{op} must have the module tests/ops/cases/{op}.py"
    assert getattr(module, "CASES", []), f"{op} must have a call in CASES of cases/{op}.py"
    names = [case.name for case in module.CASES]
    assert len(set(names)) == len(names), f"{op}: {names} must differ"


@pytest.mark.parametrize("op", OPS)
def test_operators_that_take_a_gradient_have_a_formula(op):
    inputs = any(case.shapes(cases.Sizes(3, 2, 2, 3, 2, 2)) for case in cases.cases(op))
    if registry.differentiable(op):
        assert inputs, f"{op} is declared with backward: a call must have inputs"
    else:
        assert not inputs, f"{op} must be declared with backward, or its calls have no inputs"


@pytest.fixture(scope="module")
def launches():
    """What all cases launch for a GPU of the kind that most is compiled for."""
    pytest.importorskip("triton")
    import kernels

    from unimoe_kernels._triton import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "STAND_IN", launch.Device(90, 132, 227 * 1024))
        return {
            module.__name__: [
                one for _, run in module.launches(False) for one in kernels.record_launches(run)
            ]
            for module in cases.with_launches()
        }


def missing_modules(wanted, launches):
    """Lists the modules through which the cases of their own operator launch nothing."""
    return [
        name
        for name in wanted
        if not any(name in one.modules for one in launches.get(f"cases.{name.split('.')[2]}", []))
    ]


def never_launched(functions, launches):
    """Lists the functions that nothing launches and that no kernel which is launched calls."""
    import kernels

    used = {
        id(function)
        for ours in launches.values()
        for one in ours
        for function in kernels.names_used(one.kernel)[1]
    }
    return [name for name, function in functions.items() if id(function) not in used]


def test_every_module_of_kernels_is_launched(launches):
    import kernels

    names = kernels.modules_of_kernels()
    assert names
    missing = missing_modules(names, launches)
    assert not missing, f"launches in tests/ops/cases must go through {', '.join(missing)}"


def test_every_kernel_is_launched(launches):
    import kernels

    functions = kernels.functions()
    assert len(functions) > 20
    missing = never_launched(functions, launches)
    assert not missing, f"launches in tests/ops/cases must run {', '.join(missing)}"


def test_what_is_left_out_is_named(launches):
    import kernels

    without = {name: ours for name, ours in launches.items() if name != "cases.permute"}
    wanted = kernels.modules_of_kernels()
    assert "unimoe_kernels.ops.permute.kernel" in missing_modules(wanted, without)
    assert "unimoe_kernels.ops.permute.kernel.permute_kernel" in never_launched(
        kernels.functions(), without
    )
    without = {name: ours for name, ours in launches.items() if name != "cases.moe_mlp"}
    assert "unimoe_kernels.ops.moe_mlp.fused" in missing_modules(wanted, without)
    assert cases.of("an_operator_without_a_module") is None
