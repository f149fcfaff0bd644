"""How numbers of partial results are packed, on a CPU: integers in the place of the kernel's."""

import torch

from tests.helpers.requirements import import_fused

COUNT = 4096
EXPONENT = 0xFF << 23


def test_integers_and_their_exponent_come_out_of_the_words():
    rows = import_fused("nsa.fused.kernels.partial_rows")
    integers = torch.randint(-1024, 1024, (8, COUNT))
    integers[:, :2] = torch.tensor([-1024, 1023])
    exponent = torch.randint(12, 0xFF, (COUNT,)) << 23
    sums = integers + torch.tensor(rows.ROUNDERS, dtype=torch.float64)[:, None]
    bits = sums.float().view(torch.int32).long()
    a, b, c = (word & 0xFFFFFFFF for word in rows.join_integers(list(bits), exponent))
    assert torch.equal(a & EXPONENT, exponent)
    found = [a >> 12, a >> 1, b >> 21, b >> 10, c >> 21, c >> 10]
    found += [b << 1 & 0x7FE | a & 1, c << 1 & 0x7FE | a >> 31]
    assert torch.equal((torch.stack(found) & 0x7FF) - 1024, integers)


def test_what_is_not_finite_keeps_its_exponent():
    rows = import_fused("nsa.fused.kernels.partial_rows")
    bits = torch.randint(0, 1 << 31, (8, COUNT))
    word, *_ = rows.join_integers(list(bits), torch.full((COUNT,), EXPONENT))
    assert (word & EXPONENT == EXPONENT).all()
