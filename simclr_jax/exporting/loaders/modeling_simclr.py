"""The ResNets of SimCLR v1 and v2 in PyTorch: any width, selective kernels, squeeze-excite, the CIFAR stem.

Parameters are called as in torchvision and timm where these have them.  Needs torch alone.
"""

import torch
from torch import nn
from torch.nn import functional

DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
  200: ((3, 24, 36, 3), True),
}


def conv(inputs, outputs, size, stride=1, bias=False):
  return nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, bias=bias)


class ResNet(nn.Module):
  """images float32 [n, 3, h, w] in [0, 1] -> h [n, d]."""

  def __init__(self, depth, width=1, sk_ratio=0.0, se_ratio=0.0, stem="imagenet", pool_padding="official"):
    super().__init__()
    blocks, bottleneck = DEPTHS[depth]
    filters = int(64 * width)
    self.pool = pool_padding if stem == "imagenet" else None
    if stem == "cifar":
      self.conv1 = conv(3, filters, 3)
    elif sk_ratio > 0:
      half = filters // 2
      first = (conv(3, half, 3, 2), nn.BatchNorm2d(half), nn.ReLU())
      second = (conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU())
      self.conv1 = nn.Sequential(*first, *second, conv(half, filters, 3))
    else:
      self.conv1 = conv(3, filters, 7, 2)
    self.bn1 = nn.BatchNorm2d(filters)
    inputs = filters
    for i, count in enumerate(blocks):
      filters = int(64 * 2**i * width)
      layer = []
      for j in range(count):
        stride = 2 if i and not j else 1
        layer.append(Block(inputs, filters, stride, not j, bottleneck, sk_ratio, se_ratio))
        inputs = filters * (4 if bottleneck else 1)
      setattr(self, f"layer{i + 1}", nn.Sequential(*layer))

  def forward(self, x):
    x = functional.relu(self.bn1(self.conv1(x)))
    if self.pool == "torch":
      x = functional.max_pool2d(x, 3, 2, 1)
    elif self.pool == "official":  # an even side is padded at its end only
      height, width = x.shape[-2:]
      x = functional.max_pool2d(functional.pad(x, (width % 2, 1, height % 2, 1), value=-float("inf")), 3, 2)
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return x.mean((2, 3))


class Block(nn.Module):
  """Two 3x3 convolutions, or 1x1, 3x3, 1x1; the first of a group projects its shortcut, in the first group too."""

  def __init__(self, inputs, filters, stride, project, bottleneck, sk_ratio, se_ratio):
    super().__init__()
    outputs = filters * (4 if bottleneck else 1)
    self.bottleneck, self.selective = bottleneck, bottleneck and sk_ratio > 0
    if project:
      shortcut = (conv(inputs, outputs, 1, 1 if sk_ratio > 0 else stride), nn.BatchNorm2d(outputs))
      self.downsample = nn.Sequential(*shortcut)
      self.pool_stride = stride if sk_ratio > 0 else 0
    else:
      self.downsample = None
    self.conv1 = conv(inputs, filters, *((1, 1) if bottleneck else (3, stride)))
    self.bn1 = nn.BatchNorm2d(filters)
    if self.selective:
      self.conv2 = SelectiveKernel(filters, stride, sk_ratio)
    else:
      self.conv2 = conv(filters, filters, 3, stride if bottleneck else 1)
      self.bn2 = nn.BatchNorm2d(filters)
    if bottleneck:
      self.conv3 = conv(filters, outputs, 1)
      self.bn3 = nn.BatchNorm2d(outputs)
    self.se = SqueezeExcite(outputs, max(1, int(filters * se_ratio))) if se_ratio > 0 else None

  def forward(self, x):
    shortcut = x
    if self.downsample is not None:
      shortcut = self.downsample(resnet_d_pool(x, self.pool_stride) if self.pool_stride else x)
    x = functional.relu(self.bn1(self.conv1(x)))
    if self.bottleneck:
      x = self.conv2(x) if self.selective else functional.relu(self.bn2(self.conv2(x)))
      x = self.bn3(self.conv3(x))
    else:
      x = self.bn2(self.conv2(x))
    x = x if self.se is None else self.se(x)
    return functional.relu(x + shortcut)


class SelectiveKernel(nn.Module):
  """Two 3x3 streams mixed by a softmax over streams, one weight a channel."""

  def __init__(self, filters, stride, ratio):
    super().__init__()
    reduced = max(int(filters * ratio), 32)
    self.conv, self.bn = conv(filters, 2 * filters, 3, stride), nn.BatchNorm2d(2 * filters)
    self.reduce, self.reduce_bn = conv(filters, reduced, 1), nn.BatchNorm2d(reduced)
    self.expand = conv(reduced, 2 * filters, 1)

  def forward(self, x):
    x = functional.relu(self.bn(self.conv(x))).unflatten(1, (2, -1))
    g = x.mean((3, 4)).sum(1)[..., None, None]
    g = self.expand(functional.relu(self.reduce_bn(self.reduce(g))))
    return (x * torch.softmax(g.unflatten(1, (2, -1)), 1)).sum(1)


class SqueezeExcite(nn.Module):
  """Scales channels by a sigmoid of their averages."""

  def __init__(self, channels, reduced):
    super().__init__()
    self.fc1, self.fc2 = conv(channels, reduced, 1, bias=True), conv(reduced, channels, 1, bias=True)

  def forward(self, x):
    g = functional.relu(self.fc1(x.mean((2, 3), keepdim=True)))
    return x * torch.sigmoid(self.fc2(g))


def resnet_d_pool(x, stride):
  """ResNet-D's average-pool: at stride 2 the zeros at the end count, at stride 1 they do not, as if replicated."""
  mode = "replicate" if stride == 1 else "constant"
  return functional.avg_pool2d(functional.pad(x, (0, 1, 0, 1), mode=mode), 2, stride)
