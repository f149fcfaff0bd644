"""On the GPU: the tables of plans, against their emulation."""

import pytest
import torch

import nsa
from nsa.fused import kernel_calls
from nsa.fused.compressed_forms import CompressedForm
from nsa.fused.kernel_inputs import MOST_FEW_KEYS
from nsa.fused.plan_tables import make_rule
from nsa.testing import make_cu_seqlens
from tests.helpers import emulated_plan
from tests.helpers.gpu_cases import gpu_test

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

LENGTHS = {
    "few": ([300, 0, 24, 1, 187], [12, 0, 24, 1, 60]),
    "one": ([1000], [100]),
    "empty ends": ([0, 0, 65, 63, 0], [0, 0, 64, 1, 0]),
    "many": ([(i * 37) % 91 for i in range(1500)], [(i * 37) % 91 // 3 for i in range(1500)]),
    "long": ([70_000, 5, 4_000], [1, 5, 3_999]),
}
CONFIGS = {
    "token": nsa.NSAConfig.paper(),
    "token, equal blocks": nsa.NSAConfig(
        selection="token", compress_block_size=64, compressed_visibility="started"
    ),
    "token, not causal": nsa.NSAConfig(selection="token", causal=False),
    "tile": nsa.NSAConfig(),
    "tile, mean": nsa.NSAConfig(tile_summary="mean", q_tile_size=128),
    "tile, groups": nsa.NSAConfig(num_cmp_selected_blocks=2, cmp_group_size=64),
    "tile, started groups": nsa.NSAConfig(
        num_cmp_selected_blocks=2, compressed_visibility="started"
    ),
    "tile, not causal": nsa.NSAConfig(causal=False, compress_block_size=32),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "chunks"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("config", CONFIGS)
def test_bounds_and_tables(config, lengths, whole):
    config, (keys, queries) = CONFIGS[config], LENGTHS[lengths]
    if whole:
        queries = keys
    elif config.selection == "tile":
        size = config.q_tile_size  # queries start at a tile
        queries = [n - n // size // 2 * size for n in keys]
    cu_seqlens, cu_seqlens_k = (make_cu_seqlens(x, "cuda") for x in (queries, keys))
    rule = make_rule(
        config,
        num_queries=sum(queries) + 3,  # items of no sequence at the end
        num_keys=sum(keys) + 3,
        sequences=len(keys),
        whole=whole,
        form=_form(config),
        folded=_form(config) is CompressedForm.PACKED,
        token_tile=24,
        key_blocks=(64, 64),
        most_few_keys=MOST_FEW_KEYS if config.causal else 1,
    )
    bounds = kernel_calls.sequence_bounds(cu_seqlens, cu_seqlens_k, rule)
    cpu = (cu_seqlens.cpu(), cu_seqlens_k.cpu())
    assert torch.equal(bounds.cpu(), emulated_plan.sequence_bounds(*cpu, rule))
    for means in (False, True):
        tables = kernel_calls.plan_tables(cu_seqlens, cu_seqlens_k, bounds, rule, means)
        wanted = emulated_plan.plan_tables(*cpu, bounds.cpu(), rule, means)
        for name, table in tables._asdict().items():
            expected = getattr(wanted, name)
            assert (table is None) == (expected is None), name
            if table is not None:
                assert table.data_ptr() % 16 == 0
                assert torch.equal(table.cpu(), expected), name


def _form(config) -> CompressedForm:
    if config.num_cmp_selected_blocks is not None:
        return CompressedForm.LISTED
    return CompressedForm.PACKED if config.causal else CompressedForm.ALL
