"""Training images that stay together: frames of a video, views of one thing, copies."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from cifar_transfer.base.errors import UserError


def compiled(group: str) -> re.Pattern[str]:
    """Return a regular expression that tells the groups of images.

    Raises:
        UserError: It is none.
    """
    try:
        return re.compile(group)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"group={group} is no regular expression ({error}): take one such as '(.+)_\\d+', "
            f"which groups clip_1.png and clip_2.png as clip."
        ) from None


def refuse_one_group(option: str, keys: Sequence[str], what_else: str) -> None:
    """Refuse groups that leave nothing to be held out.

    Args:
        option: The option that makes the groups, with its value.
        keys: Group of each training image.
        what_else: What to take in its place, such as "an expression".

    Raises:
        UserError: All images are in one group.
    """
    if len(keys) > 1 and len(set(keys)) == 1:
        raise UserError(
            f"{option} puts all training images into one group, {keys[0]!r}: take {what_else} that "
            f"tells them apart."
        )


class GroupNames:
    """The groups of images, by a regular expression.

    The group of an image is the first bracketed group of the first match, or the whole match if the
    expression has no brackets. An image without a match is a group of its own.

    Args:
        group: The regular expression.
        part: Returns the part of an image's name that the expression is looked for in.
    """

    def __init__(self, group: str, part: Callable[[str], str]) -> None:
        self.group = group
        self._pattern = compiled(group)
        self._part = part

    def keys(self, names: Sequence[str]) -> tuple[list[str], int]:
        """Return the group of each image, and how many images are one of their own.

        Raises:
            UserError: No name matches, or all images would be one group.
        """
        keys = []
        num_unmatched = 0
        for name in names:
            match = self._pattern.search(self._part(name))
            key = None
            if match is not None:
                key = match[1] if self._pattern.groups else match[0]
            if key is None:
                num_unmatched += 1
                key = name
            keys.append(key)
        if names and num_unmatched == len(names):
            raise UserError(
                f"group={self.group} matches none of the names of the training images, such as "
                f"{self._part(names[0])}: take another expression."
            )
        refuse_one_group(f"group={self.group}", keys, "an expression")
        return keys, num_unmatched


def with_copies_together(keys: Sequence[str], contents: np.ndarray) -> Sequence[str]:
    """Return keys of groups in which images of the same content have the same key.

    Args:
        keys: Key of the group of each of N images.
        contents: A number for each image, int64 [N]; the same one means the same content.
    """
    by_content = np.argsort(contents, kind="stable")
    is_copy = np.flatnonzero(np.diff(contents[by_content]) == 0)
    if not len(is_copy):
        return keys
    first_keys: dict[str, str] = {}  # from a key to a lesser one of the same group, if there is one

    def first_key(key: str) -> str:
        while key in first_keys:
            key = first_keys[key]
        return key

    for place in is_copy:
        key = first_key(keys[by_content[place]])
        other_key = first_key(keys[by_content[place + 1]])
        if key != other_key:
            first_keys[max(key, other_key)] = min(key, other_key)
    return [first_key(key) for key in keys]
