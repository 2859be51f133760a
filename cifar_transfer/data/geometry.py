"""Statistics of the channels, by which networks expect their images normalised."""

import math
from collections.abc import Sequence

from cifar_transfer.errors import UserError

STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # the deviations that tutorials use
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def statistics(normalize: str | Sequence[Sequence[float]]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels, by name or as given.

    Raises:
        UserError: An unknown name, not two triples, or a deviation that is not positive.
    """
    if isinstance(normalize, str):
        if normalize not in STATISTICS:
            raise UserError(
                f"normalize={normalize!r} is unknown: take {', '.join(STATISTICS)}, or [[mean], [deviation]]."
            )
        return STATISTICS[normalize]
    triples = len(normalize) == 2 and all(len(triple) == 3 for triple in normalize)
    if not triples or not all(map(math.isfinite, [*normalize[0], *normalize[1]])) or min(normalize[1]) <= 0:
        raise UserError(f"normalize={normalize} must be two triples, the means and the positive deviations of R, G, B.")
    return normalize[0], normalize[1]
