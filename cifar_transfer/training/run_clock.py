"""Time that a run takes, and images a second that it trains on."""

import time
from typing import Any


class RunClock:
    """Time of a run's epochs, which goes on where it was when a run is resumed.

    The time between two epochs, when checkpoints are written, does not count.

    Attributes:
        images_per_second: Images a second of training in the last epoch that has ended, over all
            devices, without the time of validations.
    """

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self._earlier_seconds = 0.0  # of the epochs before this one
        self._epoch_seconds = 0.0
        self._validation_seconds = 0.0  # of this epoch, within its seconds
        self._epoch_images = 0
        self._last_reading: float | None = None  # None between two epochs

    @property
    def seconds(self) -> float:
        """Time of all epochs with their validations, also before the run was resumed."""
        return self._earlier_seconds + self._epoch_seconds

    @property
    def epoch_seconds(self) -> float:
        """Time of this epoch with its validations."""
        return self._epoch_seconds

    def start(self) -> None:
        """Start the clock for an epoch that goes on."""
        self._last_reading = time.monotonic()

    def start_epoch(self) -> None:
        """Start the clock for a new epoch."""
        self._earlier_seconds = self.seconds
        self._epoch_seconds = 0.0
        self._validation_seconds = 0.0
        self._epoch_images = 0
        self.start()

    def count_images(self, images: int) -> None:
        """Count images that are trained on, over all devices."""
        self._epoch_images += images

    def end_training(self) -> None:
        """Count the time since the last reading as time of training."""
        self._read()

    def end_validation(self) -> None:
        """Count the time since the last reading as time of a validation."""
        self._validation_seconds += self._read()

    def end_epoch(self) -> None:
        """Stop the clock until the next epoch."""
        self._read()
        self._last_reading = None
        training_seconds = self._epoch_seconds - self._validation_seconds
        if self._epoch_images:
            self.images_per_second = self._epoch_images / training_seconds

    def _read(self) -> float:
        """Return the seconds since the last reading, and add them to the epoch's."""
        if self._last_reading is None:
            return 0.0
        now = time.monotonic()
        seconds = now - self._last_reading
        self._last_reading = now
        self._epoch_seconds += seconds
        return seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the time so far, for a run that is resumed."""
        self._read()
        return {
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "epoch": {
                "seconds": self._epoch_seconds,
                "validation": self._validation_seconds,
                "images": self._epoch_images,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the time of a checkpoint."""
        epoch = state_dict["epoch"]
        self.images_per_second = state_dict["images_per_second"]
        self._earlier_seconds = state_dict["seconds"] - epoch["seconds"]
        self._epoch_seconds = epoch["seconds"]
        self._validation_seconds = epoch["validation"]
        self._epoch_images = epoch["images"]
