"""Two layers that torch does not have, for small images.

`DenseConv2d.convert` changes the class of a convolution instead of replacing it, because only `forward` differs: the
parameters and their memory format stay, and no random numbers are drawn for a new layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseConv2d(nn.Conv2d):
    """`nn.Conv2d` that is one matrix product where each output pixel sees the whole input.

    At 32 x 32 pixels the last two stages of a ResNet are 2 x 2 pixels and one pixel large, and most taps of their 3 x 3
    kernels are multiplied with padding. Here they are left out; results and gradients are the same up to rounding. What
    it gains: benchmarks/README.md.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve float [B, C, H, W]; other shapes as `nn.Conv2d` does."""
        rows, columns = self._starts(input.shape[-2], 0), self._starts(input.shape[-1], 1)
        if input.dim() != 4 or not (rows and columns):
            return super().forward(input)
        # Channels last, as the networks are kept: then nothing of this is a copy but the rows of the matrix.
        height, width = input.shape[-2:]
        kernel = self.weight.permute(0, 2, 3, 1)
        windows = torch.stack(
            [kernel[:, y : y + height, x : x + width] for y in rows for x in columns]
        )
        output = F.linear(input.permute(0, 2, 3, 1).flatten(1), windows.flatten(0, 1).flatten(1))
        output = output.unflatten(1, (len(rows), len(columns), -1)).permute(0, 3, 1, 2)
        return output if self.bias is None else output + self.bias[:, None, None].to(output.dtype)

    def _starts(self, size: int, axis: int) -> list[int]:
        """Where in the kernel the input begins for each output pixel, along one axis; empty if one does not see all."""
        kernel, padding, stride = self.kernel_size[axis], int(self.padding[axis]), self.stride[axis]
        starts = [
            padding - stride * output
            for output in range((size + 2 * padding - kernel) // stride + 1)
        ]
        return starts if all(0 <= start <= kernel - size for start in starts) else []

    @classmethod
    def convert(cls, network: nn.Module) -> None:
        """Make the padded convolutions of a network ones of this class, in place."""
        for module in network.modules():
            padded = (
                type(module) is nn.Conv2d
                and isinstance(module.padding, tuple)
                and max(module.padding) > 0
            )
            if (
                padded
                and module.groups == 1
                and module.padding_mode == "zeros"
                and module.dilation == (1, 1)
            ):
                module.__class__ = cls


class HalfMaxPool2d(nn.Module):
    """What a stem's max-pool does to an enlarged image, done to the image itself: the resolution stays.

    On the enlargement a window of three looks half a pixel of the image to each side, where a smooth response is the
    mean of two neighbours. And the largest of (x + x) / 2 and all (x + neighbour) / 2 is (x + largest of 3 x 3) / 2.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool float [B, C, H, W] into the same shape."""
        return (input + F.max_pool2d(input, 3, stride=1, padding=1)) / 2
