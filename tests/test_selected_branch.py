"""``nsa.selected_attention`` on the reference, and on the fused backend with emulated kernels."""

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses import FakeTensorMode

import nsa
from nsa.fused import kernel_calls, selected_branch
from nsa.testing import make_cu_seqlens
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.selected_cases import (
    NAMES,
    SelectedProblem,
    make_problem,
    results,
    selected_problems,
)

backends = pytest.mark.parametrize("backend", ["reference", "fused"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
pytestmark = pytest.mark.usefixtures("fused_on_cpu")


def small_problem(packed: bool = True, **changes) -> SelectedProblem:
    """A pack with an empty sequence and one of more keys than queries; or a batch of the latter."""
    lengths = [(7, 7), (0, 40), (0, 0), (30, 100)] if packed else [(30, 100)] * 2
    sizes = dict(kv_heads=2, group=2, dims=(6, 4), block_size=32, slots=3)
    return make_problem(lengths, packed=packed, **(sizes | changes))


@backends
@settings(max_examples=examples(80), **WITH_FIXTURES)
@given(problem=selected_problems())
def test_results_and_gradients_equal_dense_attention(backend, problem):
    expected = results(problem, SelectedProblem.dense)
    actual = results(problem, lambda x: x.attend(backend=backend))
    for name, *pair in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(
            *pair, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@backends
@layouts
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(backend, packed, causal):
    problem = small_problem(packed, dims=(3, 2), causal=causal)
    seen = problem.attend(backend=backend)[1].detach() > -torch.inf

    def function(*leaves):
        out, lse = problem._replace(q=leaves[0], k=leaves[1], v=leaves[2]).attend(backend=backend)
        return out, lse[seen]

    assert torch.autograd.gradcheck(function, problem.leaves, fast_mode=True)


def test_the_reference_has_second_derivatives():
    problem = small_problem(dims=(3, 2), group=1)

    def function(*leaves):
        out, lse = problem._replace(q=leaves[0], k=leaves[1], v=leaves[2]).attend(
            backend="reference"
        )
        return out.sum() + torch.where(lse > -torch.inf, lse, 0).sum()

    assert torch.autograd.gradgradcheck(function, problem.leaves, fast_mode=True)


def test_the_fused_backend_has_no_second_derivatives():
    problem = small_problem()
    out, _ = problem.attend(backend="fused")
    (grad,) = torch.autograd.grad(out.sum(), problem.q, create_graph=True)
    with pytest.raises(nsa.UnsupportedError, match=r"once, not twice; .* use backend='reference'"):
        grad.sum().backward()


@backends
@layouts
def test_later_tokens_change_nothing(backend, packed):
    lengths = [(150, 150)]
    sizes = dict(kv_heads=2, group=2, dims=(8, 8), slots=3)
    for block_size in (32, 64, 128):
        problem, other = (
            make_problem(lengths, packed=packed, block_size=block_size, seed=seed, **sizes)
            for seed in (0, 1)
        )
        expected = problem.attend(backend=backend)
        for cut in (1, 31, 64, 149):
            mixed = [
                torch.cat([x.narrow(-3, 0, cut), y.narrow(-3, cut, 150 - cut)], -3)
                for x, y in zip(problem[:4], other[:4], strict=True)
            ]
            actual = problem._replace(
                **dict(zip(("q", "k", "v", "block_indices"), mixed, strict=True))
            ).attend(backend=backend)
            for dim, *pair in zip((-3, -1), actual, expected, strict=True):
                torch.testing.assert_close(
                    *(x.narrow(dim, 0, cut) for x in pair), rtol=0, atol=1e-13
                )


@backends
@layouts
def test_pieces_give_what_the_whole_gives(backend, packed):
    problem = make_problem(
        [(130, 130)], packed=packed, kv_heads=2, group=2, dims=(8, 8), block_size=32, slots=3
    )
    whole = problem.attend(backend=backend)
    for start, stop in ((0, 1), (1, 70), (70, 130)):
        piece = problem._replace(
            q=problem.q.narrow(-3, start, stop - start),
            block_indices=problem.block_indices.narrow(-3, start, stop - start),
            k=problem.k.narrow(-3, 0, stop),
            v=problem.v.narrow(-3, 0, stop),
            lengths=[(stop - start, stop)],
        )
        # Lists may name blocks after the piece.
        blocks = -(-stop // 32)
        indices = piece.block_indices.masked_fill(piece.block_indices >= blocks, -1)
        actual = piece._replace(block_indices=indices).attend(backend=backend)
        for dim, part, all_of_it in zip((-3, -1), actual, whole, strict=True):
            torch.testing.assert_close(
                part, all_of_it.narrow(dim, start, stop - start), rtol=0, atol=1e-13
            )


@backends
def test_a_query_with_no_key(backend):
    problem = small_problem()
    problem.block_indices[3:5] = -1
    out, lse = problem.attend(backend=backend)
    assert not out[3:5].any()
    assert (lse[:, 3:5] == -torch.inf).all()
    # Whatever gradient comes for it.
    dlse = torch.zeros_like(lse)
    dlse[:, 3:5] = torch.nan
    for grad in torch.autograd.grad((out, lse), problem.leaves, (torch.ones_like(out), dlse)):
        assert grad.isfinite().all()


@backends
@pytest.mark.parametrize("used", ["output", "log-sum-exp"])
def test_gradients_through_one_result(backend, used):
    problem = small_problem()
    grads = []
    for attend in (SelectedProblem.dense, lambda x: x.attend(backend=backend)):
        out, lse = attend(problem)
        loss = out.sin().sum() if used == "output" else torch.where(lse.isfinite(), lse, 0).sum()
        grads.append(torch.autograd.grad(loss, problem.leaves, allow_unused=True))
    for actual, expected in zip(*reversed(grads), strict=True):
        if expected is None or actual is None:
            assert all(x is None or not x.any() for x in (actual, expected))
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@backends
def test_only_the_output(backend):
    problem = small_problem()
    out = problem.attend(backend=backend, return_lse=False)
    assert torch.equal(out, problem.attend(backend=backend)[0])


@backends
@layouts
def test_shapes_and_dtypes(backend, packed):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        problem = small_problem(packed).to(dtype)
        out, lse = problem.attend(backend=backend)
        assert (out.shape, out.dtype) == ((*problem.q.shape[:-1], 4), dtype)
        assert lse.shape == problem.q.shape[:-1][:-2] + problem.q.shape[-3:-1][::-1]
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def strided_forms(indices: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal tensors that lie otherwise in memory."""
    order = {
        "heads first": (1, 0, 2),
        "slots first": (2, 0, 1),
        "slots, heads, tokens": (2, 1, 0),
    }
    forms = {}
    for name, dims in order.items():
        inverse = [dims.index(i) for i in range(3)]
        forms[name] = indices.permute(dims).contiguous().permute(inverse)
    wide = indices.new_full((len(indices), 3, 8), 99)
    wide[:, :2, 1:4] = indices
    forms["slices"] = wide[:, :2, 1:4]
    return forms


@backends
def test_any_strides_of_the_lists(backend, monkeypatch):
    problem = small_problem()
    expected = results(problem, lambda x: x.attend(backend=backend))
    for name, indices in strided_forms(problem.block_indices).items():
        assert torch.equal(indices, problem.block_indices)
        actual = results(
            problem._replace(block_indices=indices), lambda x: x.attend(backend=backend)
        )
        for pair in zip(actual, expected, strict=True):
            assert torch.equal(*pair), name


@pytest.mark.parametrize("name", ["selected_forward", "selected_backward"])
def test_kernels_get_the_lists_of_the_caller(name, monkeypatch):
    """No copy of them is made, whatever their strides."""
    launch, places = getattr(kernel_calls, name), []

    def record(*arguments, **options):
        places.append({x.data_ptr() for x in arguments if isinstance(x, torch.Tensor)})
        return launch(*arguments, **options)

    monkeypatch.setattr(kernel_calls, name, record)
    problem = small_problem()
    for indices in strided_forms(problem.block_indices).values():
        results(problem._replace(block_indices=indices), lambda x: x.attend(backend="fused"))
        assert indices.data_ptr() in places.pop()


@backends
@layouts
def test_no_tokens(backend, packed):
    problem = make_problem(
        [(0, 0)] * 2 if packed else [(0, 5)] * 2,
        packed=packed, kv_heads=1, group=2, dims=(4, 4), block_size=64, slots=2,
    )  # fmt: skip
    out, lse, *grads = results(problem, lambda x: x.attend(backend=backend))
    assert out.shape == problem.q.shape
    assert lse.numel() == 0
    for grad, leaf in zip(grads, problem.leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@backends
def test_a_packing_gives_the_same(backend):
    problem = small_problem()
    packing = nsa.Packing(**problem.boundaries())
    for _ in range(2):
        actual = results(
            problem,
            lambda x: x.attend(backend=backend, cu_seqlens=packing, cu_seqlens_k=None),
        )
        expected = results(problem, lambda x: x.attend(backend=backend))
        for pair in zip(actual, expected, strict=True):
            assert torch.equal(*pair)
    if backend == "fused":
        assert len(packing._kept) == 1


@backends
def test_boundaries_may_be_overwritten_before_the_backward(backend):
    problem = small_problem()
    expected = results(problem, lambda x: x.attend(backend=backend))
    bounds = problem.boundaries()

    def attend(problem):
        results = problem.attend(backend=backend, **bounds)
        for x in bounds.values():
            x.zero_()
        return results

    for pair in zip(results(problem, attend), expected, strict=True):
        assert torch.equal(*pair)


def test_lists_may_not_be_overwritten_before_the_backward():
    problem = small_problem()
    out, _ = problem.attend(backend="fused")
    problem.block_indices.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@backends
def test_lists_of_inference_mode(backend):
    problem = small_problem()
    expected = results(problem, lambda x: x.attend(backend=backend))
    with torch.inference_mode():
        indices = problem.block_indices.clone()
    actual = results(problem._replace(block_indices=indices), lambda x: x.attend(backend=backend))
    for pair in zip(actual, expected, strict=True):
        assert torch.equal(*pair)


@layouts
def test_opcheck(packed):
    problem = small_problem(packed)
    bounds = problem.boundaries()
    torch.library.opcheck(
        selected_branch._attention,
        (
            *(x.detach().requires_grad_() for x in problem.leaves),
            problem.block_indices,
            *(bounds.get("cu_seqlens"), bounds.get("cu_seqlens_k")),
            *(32, True, 0.5, True),
        ),
    )


@layouts
def test_fake_tensors(packed):
    with FakeTensorMode():
        problem = small_problem(packed)
        out, lse, *grads = results(problem, lambda x: x.attend(backend="fused"))
    assert out.shape == (*problem.q.shape[:-1], 4)
    assert lse.shape == problem.q.shape[:-1][:-2] + problem.q.shape[-3:-1][::-1]
    assert [x.shape for x in grads] == [x.shape for x in problem.leaves]


@pytest.mark.unmeasured
@layouts
def test_compiles_once_for_all_lengths(packed):
    torch._dynamo.reset()

    def function(q, k, v, indices, cu_seqlens, max_seqlen):
        out, lse = nsa.selected_attention(
            q, k, v, indices, block_size=32, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            backend="fused",
        )  # fmt: skip
        return out.sin(), torch.where(lse.isfinite(), lse, 0).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, lengths in enumerate(([200, 5, 0], [17, 100, 140], [300, 1, 2])):
        pairs = [(n, n) for n in lengths] if packed else [(sum(lengths),) * 2] * 2
        problem = make_problem(
            pairs, packed=packed, kv_heads=2, group=2, dims=(8, 8), block_size=32, slots=3,
            seed=index,
        )  # fmt: skip
        extra = (make_cu_seqlens(lengths), max(lengths)) if packed else (None, None)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = [f(*problem[:4], *extra) for f in (function, compiled)]
        grads = [torch.autograd.grad(out.sum() + lse.sum(), problem.leaves) for out, lse in found]
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_the_reference_in_compiled_code():
    torch._dynamo.reset()
    problem = small_problem()
    compiled = torch.compile(lambda: problem.attend(backend="reference"), backend="aot_eager")
    torch.testing.assert_close(compiled(), problem.attend(backend="reference"))


def test_autocast_casts_mixed_dtypes():
    problem = small_problem().to(torch.float32)
    mixed = problem._replace(k=problem.k.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = mixed.attend(backend="reference")
        same, _ = problem.attend(backend="reference")
    assert out.dtype == torch.bfloat16
    assert lse.dtype == same.dtype == torch.float32
