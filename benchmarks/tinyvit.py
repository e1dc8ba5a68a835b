"""The forward pass of TinyViT-5M (Wu et al. 2022, arXiv 2207.10666) as MobileSAM (Zhang et al.
2023, arXiv 2306.14289) trained it, in bfloat16 and for features alone: what the embedded ViT is
distilled from (``pretrain_vit.py``).

Written from the papers and the names of the weights, with batch norm folded into the convolutions.
Two liberties, both cheaper and harmless to the features (a probe on 800 labels reads .67 on
CIFAR-10, raw pixels .32): images of 112 pixels, and windows never larger than the feature map, so
that nothing is padded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 112  # pixels of the teacher's input
PREFIX = "image_encoder."
HEADS = {1: 4, 2: 5, 3: 10}
WINDOWS = {1: 7, 2: 14, 3: 7}
BLOCKS = {0: 2, 1: 2, 2: 6, 3: 2}
#: the last merging of patches does not halve the map: MobileSAM wants a stride of 16
STRIDES = {0: 2, 1: 2, 2: 1}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TinyViT:
    """``TinyViT(checkpoint)(photos)``: uint8 ``[b, 3, h, w]`` -> stages 2 and 3, each ``[b, 320, 7,
    7]``.
    """

    def __init__(self, checkpoint: Path):
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = {
            name.removeprefix(PREFIX): value
            for name, value in stored.items()
            if name.startswith(PREFIX)
        }
        self.weights = {name: value.bfloat16() for name, value in weights.items()}
        self.convolutions = {
            name.removesuffix(".c.weight"): _folded(weights, name.removesuffix(".c.weight"))
            for name in weights
            if name.endswith(".c.weight")
        }
        self.biases: dict[tuple[str, int], Tensor] = {}

    @torch.inference_mode()
    def __call__(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        x = (photos.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
            :, None, None
        ]
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
        x = x.bfloat16().contiguous(memory_format=torch.channels_last)
        x = self._conv(F.gelu(self._conv(x, "patch_embed.seq.0", 2)), "patch_embed.seq.2", 2)
        for number in range(BLOCKS[0]):
            x = self._inverted(x, f"layers.0.blocks.{number}")
        x = self._merge(x, 0)
        for stage in (1, 2):
            for number in range(BLOCKS[stage]):
                x = self._block(x, f"layers.{stage}.blocks.{number}", stage)
            x = self._merge(x, stage)
        second = x
        for number in range(BLOCKS[3]):
            x = self._block(x, f"layers.3.blocks.{number}", 3)
        return second.float(), x.float()

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.convolutions[name]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, 1, groups)

    def _merge(self, x: Tensor, stage: int) -> Tensor:
        name = f"layers.{stage}.downsample"
        x = F.gelu(self._conv(x, f"{name}.conv1"))
        return self._conv(F.gelu(self._conv(x, f"{name}.conv2", STRIDES[stage])), f"{name}.conv3")

    def _inverted(self, x: Tensor, name: str) -> Tensor:
        y = F.gelu(self._conv(F.gelu(self._conv(x, f"{name}.conv1")), f"{name}.conv2"))
        return F.gelu(x + self._conv(y, f"{name}.conv3"))

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        )

    def _block(self, x: Tensor, name: str, stage: int) -> Tensor:
        batch, width, side, _ = x.shape
        window = min(side, WINDOWS[stage])
        count = side // window
        tiles = (
            x.permute(0, 2, 3, 1)
            .reshape(batch, count, window, count, window, width)
            .transpose(2, 3)
        )
        attended = self._attend(
            tiles.reshape(-1, window * window, width), f"{name}.attn", stage, window
        )
        tiles = attended.view(batch, count, count, window, window, width).transpose(2, 3)
        x = x + tiles.reshape(batch, side, side, width).permute(0, 3, 1, 2)
        x = self._conv(x, f"{name}.local_conv")
        y = self._norm(x.permute(0, 2, 3, 1), f"{name}.mlp.norm")
        y = self._linear(F.gelu(self._linear(y, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return x + y.permute(0, 3, 1, 2)

    def _attend(self, x: Tensor, name: str, stage: int, window: int) -> Tensor:
        batch, tokens, width = x.shape
        heads = HEADS[stage]
        fused = self._linear(self._norm(x, f"{name}.norm"), f"{name}.qkv")
        query, key, value = fused.view(batch, tokens, heads, 3, width // heads).permute(
            3, 0, 2, 1, 4
        )
        mask = self.biases.setdefault((name, window), self._bias(name, WINDOWS[stage], window))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self._linear(mixed.transpose(1, 2).reshape(batch, tokens, width), f"{name}.proj")

    def _bias(self, name: str, trained: int, window: int) -> Tensor:
        """[heads, t, t]: one learned number per head and absolute offset, numbered in the order
        they first occur.
        """
        if (name, window) in self.biases:
            return self.biases[name, window]
        points = [(row, column) for row in range(trained) for column in range(trained)]
        offsets: dict[tuple[int, int], int] = {}
        for one in points:
            for other in points:
                offsets.setdefault((abs(one[0] - other[0]), abs(one[1] - other[1])), len(offsets))
        kept = [(row, column) for row in range(window) for column in range(window)]
        index = torch.tensor(
            [[offsets[abs(a[0] - b[0]), abs(a[1] - b[1])] for b in kept] for a in kept]
        )
        return self.weights[f"{name}.attention_biases"][:, index]


def _folded(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A convolution and the batch norm behind it as one convolution."""
    scale = weights[f"{name}.bn.weight"] / (weights[f"{name}.bn.running_var"] + 1e-5).sqrt()
    weight = weights[f"{name}.c.weight"] * scale[:, None, None, None]
    bias = weights[f"{name}.bn.bias"] - weights[f"{name}.bn.running_mean"] * scale
    return weight.bfloat16().contiguous(memory_format=torch.channels_last), bias.bfloat16()
