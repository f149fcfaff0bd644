"""Every factory of uninitialised memory is poisoned, and only inside."""

import pytest
import torch

from tests.helpers.poison import poisoned_memory

FACTORIES = {
    "empty": lambda x: torch.empty(3, 2, dtype=x.dtype),
    "empty_like": torch.empty_like,
    "empty_strided": lambda x: torch.empty_strided((3, 2), (1, 3), dtype=x.dtype),
    "empty_permuted": lambda x: torch.empty_permuted((3, 2), (1, 0), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(3, 2),
    "new_empty_strided": lambda x: x.new_empty_strided((3, 2), (1, 3)),
    "resize_": lambda x: x.new_zeros(0).resize_(3, 2),
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int32, torch.int64]


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_poisons_what_has_no_values(dtype, name):
    like = torch.zeros(3, 2, dtype=dtype)
    with poisoned_memory():
        x = FACTORIES[name](like)
    assert (x.shape, x.dtype) == (like.shape, dtype)
    assert (x.isnan() if dtype.is_floating_point else x == torch.iinfo(dtype).max).all()


def test_values_are_left_alone():
    with poisoned_memory():
        made = [torch.zeros(3), torch.ones(3), torch.full((3,), 2.0), torch.arange(3.0)]
    assert [x.tolist() for x in made] == [[0] * 3, [1] * 3, [2] * 3, [0, 1, 2]]


def test_nothing_is_poisoned_afterwards():
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
