"""Figures of predictions for images, drawn while the predictions pass through."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from cifar_transfer.inference.explain import heat_map
from cifar_transfer.inference.named_images import NamedImages
from cifar_transfer.results import plots
from cifar_transfer.results.gallery import gallery, heated
from cifar_transfer.results.predictions import MAX_GALLERY_IMAGES, ImagePrediction
from cifar_transfer.results.words import language, language_of

MAX_NAME_CHARS = 60  # of an image, in the name of the file of its heat map


def draw(
    predictions: Iterable[ImagePrediction],
    images: NamedImages,
    gallery_file: Path | None,
    heat_map_folder: Path | None,
) -> Iterator[ImagePrediction]:
    """Yield predictions, and draw figures of them in the language of the checkpoint's run.

    Args:
        predictions: Predictions for the images.
        images: The images and their classifier.
        gallery_file: File for a figure of the first images with their classes, or None.
        heat_map_folder: Folder for the heat map of each image, or None.

    Raises:
        UserError: The network has no heat maps.
    """
    classifier = images.classifier
    run = images.ckpt.resolve().parent.parent
    first_predictions = []
    with language(language_of(run), classifier.class_names):
        for number, prediction in enumerate(predictions, 1):
            if heat_map_folder is not None:
                figure = heated(prediction, heat_map(classifier.model, prediction.pixels))
                name = Path(str(prediction.source)).stem[:MAX_NAME_CHARS]
                plots.save(figure, heat_map_folder / f"{number:05d}-{name}.png")
            if number <= MAX_GALLERY_IMAGES:
                first_predictions.append(prediction)
            yield prediction
        if gallery_file is not None and first_predictions:
            plots.save(gallery(first_predictions, images.num_predicted), gallery_file)
