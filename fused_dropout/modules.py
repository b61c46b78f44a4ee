"""``nn.Dropout`` on the fused path."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import dropout


class Dropout(nn.Dropout):
    r"""Sets each element of the input to zero with probability ``p`` in training, and scales the rest by 1 / (1 - p).

    An :class:`torch.nn.Dropout` in all but its forward, which calls :func:`fused_dropout.dropout`.

    Args:
        p: probability of an element to be zeroed, between 0 and 1; read at each call. Default: 0.5
        inplace: overwrite the input. Default: ``False``

    Shape: input and output have the same, any shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1.

    Example::

        >>> m = fd.Dropout(p=0.2)
        >>> m(torch.randn(20, 16)).shape
        torch.Size([20, 16])
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout(input, self.p, self.training, self.inplace)
        return dropout(input, self.p, self.training, self.inplace)
