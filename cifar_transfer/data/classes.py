"""Classes: whether data and network mean the same ones, in the same order."""

from collections.abc import Sequence

from cifar_transfer.errors import UserError

SHOWN_CLASSES = 10  # names in a message


def check_classes(trained: Sequence[str], found: Sequence[str]) -> None:
    """Refuse data whose classes, in the order of the labels, are not those that a network was trained for.

    Raises:
        UserError: The names or their order differ; the message has both lists, of long ones what differs.
    """
    lists, reordered = [list(trained), list(found)], sorted(trained) == sorted(found)
    if lists[0] == lists[1]:
        return
    if max(map(len, lists)) > SHOWN_CLASSES:  # only what differs
        if reordered:
            lists = [[name for name, other in zip(a, b, strict=True) if name != other] for a, b in (lists, lists[::-1])]
        else:
            lists = [[name for name in a if name not in b] for a, b in (lists, lists[::-1])]
    ours, theirs = (
        ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "") or "none besides"
        for names in lists
    )
    raise UserError(
        f"The data have {'their classes in another order' if reordered else 'other classes'} than the network was "
        f"trained for: the network {ours}; the data {theirs}. Name the classes as they were, or begin a new run."
    )
