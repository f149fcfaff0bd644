"""On the GPU: the product of all projections, split and its gradient, against float64."""

import pytest
import torch

from nsa.fused import kernel_calls
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import gpu_test, slice_of_heads
from tests.helpers.product_cases import THETA, ProductCase, check_gradient, check_split

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

PACKED = (5, 0, 63, 1, 200, 0, 64)
# Each option with others that may matter to it, because each case compiles two kernels.
CASES = [
    ProductCase((1,), False, 1, 1, 64, 1, (32, 16), 48),
    ProductCase((63, 63), False, 2, 3, 64, 3, None, 0),
    ProductCase((65, 65), False, 4, 4, 80, 1, (64, 64), 200),
    ProductCase((1000,), False, 2, 16, 96, 3, (64, 16), 13),
    ProductCase((1000, 1000), False, 4, 16, 128, 1, (32, 16), 192),
    ProductCase((1000,), False, 3, 1, 256, 1, None, 48),
    ProductCase(PACKED, True, 2, 3, 64, 1, (32, 16), 13),
    ProductCase(PACKED, True, 4, 4, 128, 1, (32, 16), 192, 70),
    ProductCase(PACKED, True, 1, 16, 96, 3, (64, 64), 48),
    ProductCase(PACKED, True, 4, 1, 80, 3, None, 0),
    # No block in any sequence, and in none of the last ones.
    ProductCase((31, 0, 1), True, 2, 4, 64, 1, (32, 16), 48),
    ProductCase((500, 31, 0), True, 2, 4, 16, 1, (32, 16), 48, 9),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[1:])))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@cases
@dtypes
def test_heads_of_a_product(case, dtype):
    check_split(case, dtype, "cuda")


@cases
@dtypes
def test_gradient_of_a_product(case, dtype):
    check_gradient(case, dtype, "cuda")
    check_gradient(case, dtype, "cuda", slice_of_heads)


def test_a_product_in_another_tensor_is_copied():
    """Whose rows lie apart, or begin between multiples of 16 bytes."""
    columns, call = 6 * 64, (4, 1, 1, 64, 64, None, THETA)
    wide = torch.randn(2, 33, columns + 16, device="cuda").bfloat16()
    begun = wide.view(-1)[1 : 1 + 66 * columns].view(2, 33, columns)
    for given in (wide[..., 8 : 8 + columns], wide[..., 3 : 3 + columns], begun):
        found = kernel_calls.split_product(given, *call)
        wanted = kernel_calls.split_product(
            given.clone(memory_format=torch.contiguous_format), *call
        )
        assert all(map(torch.equal, found, wanted))


def test_no_rows():
    product = torch.empty(2, 0, 6 * 64, device="cuda", dtype=torch.bfloat16)
    heads = kernel_calls.split_product(product, 4, 1, 1, 64, 64, None, THETA)
    assert [x.shape for x in heads] == [(2, 0, 4, 64), (2, 0, 1, 64), (2, 0, 1, 64)]
    found = kernel_calls.product_gradient(heads, None, None, None, 64, None, THETA)
    assert found.shape == product.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product": torch.zeros(1, 3, 96)}, "it must be one of .* on a GPU"),
        ({"heads": 5}, "product has 96 columns; heads have 112"),
        ({"head_dim": 24}, "must be multiples of 16 up to 256"),
        ({"width": 512}, "must be multiples of 16 up to 256"),
        ({"width": 0}, "width at least head_dim"),
        ({"theta": 0.5}, "it must be at least 1"),
        ({"bounds": torch.zeros(2)}, "bounds is"),
    ],
)
def test_what_cannot_be_split_is_refused(change, message):
    call = dict(
        product=torch.zeros(1, 3, 96, dtype=torch.bfloat16), heads=4, kv_heads=1, branches=1,
        head_dim=16, width=64, bounds=None, theta=THETA,
    )  # fmt: skip
    call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in (call | change).items()}
    with pytest.raises(ValueError, match=message):
        kernel_calls.split_product(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(1, 3, 1, 80)}, r"gradients\[1\] is"),
        ({"dhidden": torch.zeros(2, 8)}, "dhidden is"),
        ({"drows": None}, "drows is None"),
        ({"drows": torch.zeros(2, 1, 1, 2, 64)}, "drows is"),
        ({"bounds": make_cu_seqlens([3])}, "places are batched and bounds packed"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change, message):
    case = ProductCase((3,), False, 1, 4, 64, 1, (2, 1), 0)
    call = dict(
        keys=torch.zeros(1, 3, 1, 64), dhidden=None, drows=torch.zeros(2, 2, 1, 2, 64), bounds=None
    )
    q = torch.zeros(1, 3, 4, 64)
    call = {k: v if v is None else v.cuda() for k, v in (call | change).items()}
    call = {k: v.bfloat16() if k != "bounds" and v is not None else v for k, v in call.items()}
    keys = call.pop("keys")
    gradients = [q.cuda().bfloat16(), keys, keys]
    with pytest.raises(ValueError, match=message):
        kernel_calls.product_gradient(
            gradients, places=case.places("cuda"), head_dim=64, theta=THETA, **call
        )
