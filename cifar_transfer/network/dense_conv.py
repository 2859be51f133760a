"""A convolution and a max-pool for small images, which torch does not have.

`DenseConv2d.convert` changes the class of a convolution instead of replacing it, because only
`forward` differs: the parameters and their memory format stay, and no random numbers are drawn for
a new layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseConv2d(nn.Conv2d):
    """`nn.Conv2d` that computes one matrix product where each output pixel sees the whole input.

    At 32 x 32 pixels the last two stages of a ResNet are 2 x 2 pixels and one pixel large, and most
    taps of their 3 x 3 kernels are multiplied with padding. Here these taps are left out. Results
    and gradients are the same up to rounding. benchmarks/README.md says how much time this saves.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve float [B, C, H, W]. Other shapes are left to `nn.Conv2d`."""
        if input.dim() != 4:
            return super().forward(input)
        height, width = input.shape[-2:]
        rows = self._window_starts(height, axis=0)
        columns = self._window_starts(width, axis=1)
        if not rows or not columns:
            return super().forward(input)
        # The networks are kept channels last: there, nothing but the windows is copied.
        kernel = self.weight.permute(0, 2, 3, 1)
        windows = []
        for row in rows:
            for column in columns:
                windows.append(kernel[:, row : row + height, column : column + width])
        matrix = torch.stack(windows).flatten(0, 1).flatten(1)
        output = F.linear(input.permute(0, 2, 3, 1).flatten(1), matrix)
        output = output.unflatten(1, (len(rows), len(columns), -1)).permute(0, 3, 1, 2)
        if self.bias is None:
            return output
        return output + self.bias[:, None, None].to(output.dtype)

    def _window_starts(self, size: int, axis: int) -> list[int]:
        """Return where in the kernel the input begins, for each output pixel along one axis.

        The list is empty if an output pixel does not see the whole input.
        """
        kernel_size = self.kernel_size[axis]
        padding = int(self.padding[axis])
        stride = self.stride[axis]
        output_size = (size + 2 * padding - kernel_size) // stride + 1
        starts = []
        for position in range(output_size):
            start = padding - stride * position
            if start < 0 or start + size > kernel_size:
                return []
            starts.append(start)
        return starts

    @classmethod
    def convert(cls, network: nn.Module) -> None:
        """Make the padded convolutions of a network ones of this class, in place."""
        for module in network.modules():
            if type(module) is nn.Conv2d and _is_padded_and_plain(module):
                module.__class__ = cls


def _is_padded_and_plain(convolution: nn.Conv2d) -> bool:
    """Return whether a convolution pads with zeros, and has neither groups nor dilation."""
    if isinstance(convolution.padding, str) or max(convolution.padding) == 0:
        return False
    if convolution.padding_mode != "zeros":
        return False
    return convolution.groups == 1 and convolution.dilation == (1, 1)


class HalfMaxPool2d(nn.Module):
    """Max-pool for a stem of stride 1: what the stock pool does to an enlarged image, without it.

    On the enlargement, a window of three pixels reaches half a pixel of the image to each side,
    where a smooth response is the mean of two neighbours. The largest of all (x + neighbour) / 2 is
    (x + largest of the 3 x 3 neighbours) / 2. The resolution stays.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool float [B, C, H, W] into the same shape."""
        return (input + F.max_pool2d(input, 3, stride=1, padding=1)) / 2
