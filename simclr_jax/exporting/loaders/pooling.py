"""The max-pool of the official SimCLR code, which pads an even side at its end only; in the place of torch's."""

from torch import nn
from torch.nn import functional


class EndPaddedMaxPool(nn.Module):
  def forward(self, x):
    height, width = x.shape[-2:]
    return functional.max_pool2d(functional.pad(x, (width % 2, 1, height % 2, 1), value=-float("inf")), 3, 2)
