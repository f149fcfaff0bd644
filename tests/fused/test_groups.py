"""The groups of the sparse compressed branch, on emulated kernels; GPU tests check the same."""

import pytest

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.group_cases import GROUP_FORMS, check_groups, group_case

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("form", GROUP_FORMS, ids=str)
def test_groups_equal_reference(form, packed):
    check_groups(group_case(*form, packed), "cpu")


def test_another_group_is_noticed(monkeypatch):
    def top_blocks(*arguments, **rules):
        emulated_kernels.top_blocks(*arguments, **rules)
        best = arguments[5][0, -1, 0]
        best.copy_(best == 0)

    monkeypatch.setattr(kernel_calls, "top_blocks", top_blocks)
    with pytest.raises(AssertionError, match="not close"):
        check_groups(group_case(32, 128, 1, packed=False), "cpu")
