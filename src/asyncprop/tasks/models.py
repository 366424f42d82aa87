"""The models of the tasks: ResNet-18 and -50, an LSTM classifier, a causal transformer, an MLP.

None has dropout: it draws from the one shared random state, so that no two interleavings would see the same masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

Stem = Literal["cifar", "imagenet"]


def resnet18(classes: int, *, width: int = 64, in_channels: int = 3, stem: Stem = "cifar") -> ResNet:
    """Return ResNet-18; see `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, width=width, in_channels=in_channels, stem=stem)


def resnet50(classes: int, *, width: int = 64, in_channels: int = 3, stem: Stem = "cifar") -> ResNet:
    """Return ResNet-50; see `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, width=width, in_channels=in_channels, stem=stem)


class ResNet(nn.Module):
    """A residual network (He et al. 2015) with torchvision's parameter names, shapes and initialisation.

    With `stem="imagenet"`, `width=64`, `in_channels=3` its state_dict is interchangeable with torchvision's.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks in each of the four stages.
        classes: number of logits.
        width: channels of the first stage; each later stage has twice as many as the one before.
        in_channels: channels of the images.
        stem: `"imagenet"` is a 7x7 convolution of stride 2 and a max-pool; `"cifar"` a 3x3 convolution that keeps the
            size of small images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        classes: int,
        *,
        width: int,
        in_channels: int,
        stem: Stem,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        channels = width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(block(channels, planes, stride=2 if stage and not index else 1))
                channels = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        self.apply(_initialise_convolution)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, channels, height, width) to logits of shape (batch, classes)."""
        hidden = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in range(1, 5):
            hidden = self.get_submodule(f"layer{stage}")(hidden)
        logits: Tensor = self.fc(self.avgpool(hidden).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's change to `x`."""
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.bn2(self.conv2(hidden))
        out: Tensor = self.relu(hidden + (self.downsample(x) if self.downsample else x))
        return out


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 (which has the stride, as in torchvision) and a 1x1 convolution, and a shortcut."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(channels, planes * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's change to `x`."""
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(hidden))
        out: Tensor = self.relu(hidden + (self.downsample(x) if self.downsample else x))
        return out


def _downsample(channels: int, planes: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == planes:
        return None
    return nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def _initialise_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class LstmClassifier(nn.Module):
    """A two-layer LSTM over embedded tokens, of packed variable lengths; its last state is classified (Sec. 4.2).

    Args:
        vocabulary: number of tokens; 0 is padding.
        classes: number of logits.
        width: hidden units of each layer.
        embedding: size of a token's vector.
        layers: LSTM layers.
    """

    def __init__(
        self, vocabulary: int, classes: int, *, width: int = 256, embedding: int = 128, layers: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, width, layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Map tokens of shape (batch, time), of which the first `lengths` of each row count, to (batch, classes)."""
        packed = pack_padded_sequence(self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        logits: Tensor = self.head(hidden[-1])
        return logits


class CausalTransformer(nn.Module):
    """A small pre-norm transformer that predicts the next token; the output weight is the embedding (tied).

    Args:
        vocabulary: number of tokens.
        context: longest sequence.
        width: size of the residual stream; a multiple of `heads`.
        layers, heads: of the stack.
    """

    def __init__(self, vocabulary: int, *, context: int, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of the {heads} heads (got {width})")
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.apply(_initialise_transformer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, time) to logits of shape (batch, time, vocabulary)."""
        hidden = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class TransformerBlock(nn.Module):
    """Causal attention and a feed-forward layer, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same."""
        x = x + self._attend(self.norm1(x))
        out: Tensor = x + self.contract(nn.functional.gelu(self.expand(self.norm2(x))))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.project(attended.transpose(1, 2).reshape(batch, time, width))
        return out


def _initialise_transformer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Mlp(nn.Sequential):
    """Linear layers with ReLU between them; maps (batch, sizes[0]) to (batch, sizes[-1])."""

    def __init__(self, *sizes: int) -> None:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[:-1])
