"""`LabelledFolder`: new images in folders of classes, on which a trained network is tested."""

from collections.abc import Sequence
from pathlib import Path

from cifar_transfer.data.files import FileDataModule
from cifar_transfer.data.geometry import Geometry
from cifar_transfer.data.image_files import Files
from cifar_transfer.data.layout import class_files, class_folders, find_layout
from cifar_transfer.data.left_aside import LeftAside
from cifar_transfer.data.module import EarlierRun
from cifar_transfer.data.splits import Split


class LabelledFolder(FileDataModule):
    """Test images alone, `folder/<class>/*`, of the classes of a network.

    Some of the classes may have no images.

    Args:
        folder: The folder.
        class_names: Names of the network's classes, in the order of its outputs.
        geometry: What was done to the images that the network was trained on.

    Raises:
        UserError: A folder is no class's, or there are no images; when they are loaded.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], geometry: Geometry) -> None:
        super().__init__(folder, fit=geometry.fit)
        self._class_names = list(class_names)
        self.continue_from(EarlierRun(size=geometry.size, grey_range=geometry.grey_range))

    @property
    def class_names(self) -> list[str]:
        """Names of the network's classes."""
        return self._class_names

    def list_files(self, split: Split) -> Files | None:
        """Return the files of the test; there are no others."""
        if split != "test":
            return None
        left_aside = LeftAside()
        folders = class_folders(self.folder, left_aside)
        return class_files(
            self.folder, folders, self._class_names, left_aside, may_lack_classes=True
        )


def find_test_images(root: Path, class_names: Sequence[str]) -> Path | None:
    """Return the folder of the classes of test images that come alone, without training images.

    Args:
        root: A folder with `test/`, or with the folders of the classes.
        class_names: Names of the classes, of which a folder without `test/` has one at least.

    Returns:
        `root/test` or `root`; None if the folder is another one.
    """
    if not root.is_dir():
        return None
    folders = find_layout(root).folders
    if "train" not in folders and "test" in folders:
        return folders["test"]
    has_no_splits = not folders or folders == {"train": root}
    if has_no_splits and not class_folders(root).keys().isdisjoint(class_names):
        return root
    return None
