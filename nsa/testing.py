"""Input factories and the accuracy assertion, for tests and tools."""

import torch
from torch import Tensor


def make_inputs(
    leading: tuple[int, ...],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal ``q``, ``k`` and ``v``; ``leading`` is ``(B, N)``, or ``(T,)`` for packed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    heads = ((num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, value_dim or head_dim))
    q, k, v = (
        torch.randn(*leading, *shape, generator=generator, device=device)
        .to(dtype)
        .requires_grad_(requires_grad)
        for shape in heads
    )
    return q, k, v


def make_cu_seqlens(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Boundaries of packed sequences of these lengths, int32 ``(S + 1,)``."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def assert_as_accurate(
    name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor, atol: float = 1e-5
):
    """Assert that the error of ``actual`` is at most twice that of the reference in its dtype.

    The check covers the root mean square and the largest error. For the largest, half a unit in the
    last place of the largest value is added to the reference's error, because the largest of a few
    rounding errors is a matter of luck.

    Args:
        name: what is compared, for the message.
        actual: the result to judge.
        same_dtype: the reference's result for the same inputs in the same dtype.
        exact: the reference's result in float64.
        atol: absolute error allowed in addition, for inputs of order 1. A gradient that is 0 by
            cancellation, such as through a softmax over one key, is float32 rounding noise.

    Raises:
        AssertionError: the error exceeds the budget; the message gives both.
    """
    if actual.shape != exact.shape or actual.dtype != same_dtype.dtype:
        raise AssertionError(
            f"{name}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(exact.shape)} "
            f"{same_dtype.dtype}"
        )
    if exact.numel() == 0:
        return
    error, own = actual.double() - exact, same_dtype.double() - exact
    half_unit = torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item()
    for kind, found, reference, slack in (
        ("root mean square", _rms(error), _rms(own), 0.0),
        ("largest", error.abs().max().item(), own.abs().max().item(), half_unit),
    ):
        budget = 2 * (reference + slack) + atol
        # This form also fails for NaN.
        if not found <= budget:
            raise AssertionError(
                f"{name}: {kind} error {found:.3e} exceeds {budget:.3e}, from the reference's own "
                f"{reference:.3e}"
            )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
