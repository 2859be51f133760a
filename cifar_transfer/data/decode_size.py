"""The size that images are decoded to: given, or chosen by a sample of the training images."""

from collections.abc import Callable, Sequence

from cifar_transfer.data.geometry import (
    Fit,
    Size,
    check_decode_size,
    check_fit,
    choose_size,
    size_with_room,
)


class DecodeSize:
    """The size that a data module's images are decoded to.

    Args:
        side: Side in pixels of the squares that images become, or None to choose the size.
        fit: How images of another shape are brought to the size.
        sample: Returns the sizes of some training images. It is called once, when they are needed.

    Raises:
        UserError: `side` or `fit` is out of its range.
    """

    def __init__(self, side: int | None, fit: Fit, sample: Callable[[], list[Size]]) -> None:
        check_decode_size(side)
        check_fit(fit)
        self.side = side
        self.fit: Fit = fit
        self._sample = sample
        self._sampled_sizes: list[Size] = []

    @property
    def sampled_sizes(self) -> Sequence[Size]:
        """Sizes of some training images; empty as long as they were not needed."""
        return self._sampled_sizes

    def choose(self, largest_side: int | None) -> Size:
        """Return the size, which suits the training images and the network if none is given.

        Args:
            largest_side: As in `geometry.choose_size`.
        """
        if self.side is not None:
            return self.side, self.side
        return choose_size(self._sizes(), largest_side)

    def with_room(self, size: Size) -> Size:
        """Return the size of images that parts of a size are cut out of, see `size_with_room`."""
        return size_with_room(size, self._sizes(), self.fit)

    def _sizes(self) -> list[Size]:
        if not self._sampled_sizes:
            self._sampled_sizes = self._sample()
        return self._sampled_sizes
