"""What follows from a tensor's values, kept as long as the tensor has them."""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class PerValues:
    """A dictionary for each tensor that is alive, a new one after PyTorch changed its values.

    A stack of layers gets the same tensor again and again. What is kept must not keep the tensor
    alive.
    """

    def __init__(self):
        self._known = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, x: Tensor) -> dict:
        # Tensors made in inference mode count no changes.
        if x.is_inference():
            return {}
        state = (x._version, x.data_ptr())
        seen, kept = self._known.get(x, (None, None))
        if seen != state:
            kept = {}
            self._known[x] = (state, kept)
        return kept
