"""Images that are nearly an earlier one: features and spectra propose pairs, pixels decide.

What is compared of an image is small and grey. All correlations are those of the middle of one
image with a part of the other one that has the same size, at the shift where they are most alike.
"""

import math
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_transfer.features.findings import (
    COMPARED_SIDE,
    Finding,
    Neighbours,
    most_similar,
)

MIN_COSINE = 0.5  # of the features of near-duplicates
NUM_SPECTRAL_NEIGHBOURS = 5  # with like spectra, and as many with mirrored ones
SPECTRUM_MARGIN = 2  # pixels at each edge that the spectrum does not see
MAX_FREQUENCY = 8  # of the spectrum, in waves over the image
MIN_SPECTRUM_COSINE = 0.5  # of near-duplicates
MAX_SHIFT = 4  # pixels by which compared images may be shifted
NUM_COMPARED_PAIRS = 512  # that are compared at once
# Pairs whose correlation is less, before one of the images is turned or enlarged, are given up.
MIN_FIRST_CORRELATION = 0.65
ANGLES = (-5.0, -2.5, 0.0, 2.5, 5.0)  # degrees by which an image is turned
SCALES = (7 / 8, 15 / 16, 1.0, 16 / 15, 8 / 7)  # by which it is enlarged or reduced
MIN_CORRELATION = 0.9  # of near-duplicates
MIN_DETAIL_CORRELATION = 0.75  # of near-duplicates, less all that is coarse
DETAIL_SIDE = 5  # pixels over which the mean is coarse
MIN_DEVIATION = 2.0  # of pixels; parts that vary less are like no other
TIE_MARGIN = 1e-4  # correlations that differ by less are equal

SIDE = COMPARED_SIDE - 2 * MAX_SHIFT  # of the middle, in pixels
NUM_SHIFTS = 2 * MAX_SHIFT + 1  # in each direction


class _Parts(NamedTuple):
    """All parts of B images that have the size of the middle, as correlations need them.

    Attributes:
        images: The images, float32 [B, COMPARED_SIDE, COMPARED_SIDE].
        transforms: Their Fourier transforms, complex64.
        norms: Norm of each part less its mean, float32 [B, NUM_SHIFTS, NUM_SHIFTS].
    """

    images: Tensor
    transforms: Tensor
    norms: Tensor


class _Alignment(NamedTuple):
    """B images, each changed and shifted so that it is like another one.

    Attributes:
        images: The images as they were changed, float32 [B, COMPARED_SIDE, COMPARED_SIDE].
        shifts: Number of the shift, row by row, int64 [B].
        correlations: Correlation with the other image, float32 [B].
    """

    images: Tensor
    shifts: Tensor
    correlations: Tensor


def near_duplicates(neighbours: Neighbours, grey: Tensor) -> list[Finding]:
    """Return images that are nearly an earlier one, the surest first.

    They may be shifted, mirrored, upside down, turned or enlarged a little, brightened, without
    colours, or compressed. An image that is like several is listed with the one most like it, or
    the earliest of equal ones.

    Args:
        neighbours: Neighbours of each image by features.
        grey: See `findings.ComparedImages`.
    """
    best: dict[int, Finding] = {}
    candidates = _candidate_pairs(neighbours, grey)
    if len(candidates) == 0:
        return []
    for pairs in candidates.split(NUM_COMPARED_PAIRS):
        scores = similarities(grey[pairs[:, 0]], grey[pairs[:, 1]])
        for (later, earlier), score in zip(pairs.tolist(), scores.tolist(), strict=True):
            if score < MIN_CORRELATION:
                continue
            if later not in best or score > best[later].score + TIE_MARGIN:
                best[later] = Finding(later, score, earlier)
    return sorted(best.values(), key=lambda finding: -finding.score)


def _candidate_pairs(neighbours: Neighbours, grey: Tensor) -> Tensor:
    """Return the pairs (later row, earlier row) that may be alike, int64 [P, 2], sorted."""
    plain, mirrored = _spectra(grey)
    pairs = [_pairs(neighbours, MIN_COSINE)]
    for spectra in (plain, mirrored):
        neighbours = most_similar(spectra, plain, NUM_SPECTRAL_NEIGHBOURS)
        pairs.append(_pairs(neighbours, MIN_SPECTRUM_COSINE))
    return torch.cat(pairs).unique(dim=0)


def _pairs(neighbours: Neighbours, min_cosine: float) -> Tensor:
    """Return the pairs (later row, earlier row) of neighbours, int64 [P, 2]."""
    rows = torch.arange(len(neighbours.rows))[:, None].expand_as(neighbours.rows)
    later = torch.maximum(rows, neighbours.rows)
    earlier = torch.minimum(rows, neighbours.rows)
    return torch.stack((later, earlier), 2)[neighbours.cosines >= min_cosine]


def _spectra(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Return the spectra of images and of their mirror images, unit vectors, float32 [N, F].

    A spectrum is how strong each frequency is, wherever in the image. So it hardly changes when an
    image is shifted; and upside down an image has the spectrum of its mirror image.
    """
    inner = slice(SPECTRUM_MARGIN, COMPARED_SIDE - SPECTRUM_MARGIN)
    window = torch.hann_window(COMPARED_SIDE - 2 * SPECTRUM_MARGIN, periodic=False)
    frequencies = torch.arange(-MAX_FREQUENCY, MAX_FREQUENCY + 1)
    parts = []
    for images in grey.split(NUM_COMPARED_PAIRS):
        floats = images[:, inner, inner].float()
        floats = floats - floats.mean((1, 2), keepdim=True)
        floats = floats * window * window[:, None]
        # Real images have the same strength at opposite frequencies, so that half of them do.
        strengths = torch.fft.rfft2(floats).abs()[:, frequencies, : MAX_FREQUENCY + 1].sqrt()
        parts.append(F.normalize(strengths.flatten(1)).view_as(strengths))
    strengths = torch.cat(parts)
    less_mean = (strengths - strengths.mean(0)).flatten(1)
    mirrored = strengths.flip(1)
    mirrored_less_mean = (mirrored - mirrored.mean(0)).flatten(1)
    return F.normalize(less_mean), F.normalize(mirrored_less_mean)


def similarities(images: Tensor, others: Tensor) -> Tensor:
    """Return the correlation of each image with another one, at their most alike, float32 [B].

    It is 0 where the details of the two are not alike: skies, roads and silhouettes are alike in
    all that is coarse.

    Args:
        images: uint8 [B, COMPARED_SIDE, COMPARED_SIDE].
        others: The same.
    """
    floats = images.float()
    parts = _parts(others.float())
    best = _align(floats, parts)
    for flipped in (floats.flip(2), floats.flip(1)):
        best = _better(best, _align(flipped, parts))
    scores = torch.zeros(len(images))
    rows = (best.correlations >= MIN_FIRST_CORRELATION).nonzero()[:, 0]
    if len(rows) == 0:
        return scores
    parts = _Parts(*(values[rows] for values in parts))
    refined = _refine(_Alignment(*(values[rows] for values in best)), parts)
    alike = _detail_correlations(refined, parts.images) >= MIN_DETAIL_CORRELATION
    scores[rows[alike]] = refined.correlations[alike]
    return scores


def _parts(images: Tensor) -> _Parts:
    """Return the parts of float32 images [B, COMPARED_SIDE, COMPARED_SIDE]."""
    images = images - images.mean((1, 2), keepdim=True)  # so that squares round little
    means = F.avg_pool2d(images[:, None], SIDE, 1)[:, 0]
    variances = F.avg_pool2d(images[:, None].square(), SIDE, 1)[:, 0] - means.square()
    norms = SIDE * variances.clamp_min(MIN_DEVIATION**2).sqrt()
    return _Parts(images, torch.fft.rfft2(images), norms)


def _align(images: Tensor, parts: _Parts) -> _Alignment:
    """Shift images, float32 [B, COMPARED_SIDE, COMPARED_SIDE], so that each is like its other."""
    middles = _unit(images[:, MAX_SHIFT:-MAX_SHIFT, MAX_SHIFT:-MAX_SHIFT].flatten(1))
    transforms = torch.fft.rfft2(middles.view(-1, SIDE, SIDE), (COMPARED_SIDE, COMPARED_SIDE))
    # The correlation theorem; as far as the middle is shifted, it does not wrap around.
    products = torch.fft.irfft2(transforms.conj() * parts.transforms)
    correlations = products[:, :NUM_SHIFTS, :NUM_SHIFTS] / parts.norms
    best = correlations.flatten(1).max(1)
    return _Alignment(images, best.indices, best.values)


def _unit(values: Tensor) -> Tensor:
    """Return rows less their mean, of norm 1 unless they hardly vary, float32 [B, SIDE**2]."""
    return F.normalize(values - values.mean(1, keepdim=True), eps=SIDE * MIN_DEVIATION)


def _better(one: _Alignment, other: _Alignment) -> _Alignment:
    """Return the alignment with the higher correlation, for each image."""
    is_better = other.correlations > one.correlations + TIE_MARGIN
    return _Alignment(
        torch.where(is_better[:, None, None], other.images, one.images),
        torch.where(is_better, other.shifts, one.shifts),
        torch.where(is_better, other.correlations, one.correlations),
    )


def _refine(alignment: _Alignment, parts: _Parts) -> _Alignment:
    """Turn and scale the images of an alignment, so that they are more like the others."""
    best = alignment
    for angle, scale in product(ANGLES, SCALES):
        changed = _turn(alignment.images, angle, scale)
        best = _better(best, _align(changed, parts))
    return best


def _turn(images: Tensor, angle: float, scale: float) -> Tensor:
    """Turn images by an angle in degrees, and show `scale` times as much of them."""
    cosine = scale * math.cos(math.radians(angle))
    sine = scale * math.sin(math.radians(angle))
    matrix = torch.tensor([[cosine, -sine, 0], [sine, cosine, 0]])
    size = [len(images), 1, COMPARED_SIDE, COMPARED_SIDE]
    grid = F.affine_grid(matrix.expand(len(images), -1, -1), size, align_corners=False)
    turned = F.grid_sample(
        images[:, None], grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return turned[:, 0]


def _detail_correlations(alignment: _Alignment, others: Tensor) -> Tensor:
    """Return the correlation of the details of aligned images with those of others, [B]."""
    middles = _details(alignment.images)[:, MAX_SHIFT:-MAX_SHIFT, MAX_SHIFT:-MAX_SHIFT]
    all_parts = _details(others).unfold(1, SIDE, 1).unfold(2, SIDE, 1)
    rows = torch.arange(len(others))
    top = alignment.shifts // NUM_SHIFTS
    left = alignment.shifts % NUM_SHIFTS
    parts = all_parts[rows, top, left]
    return (_unit(middles.flatten(1)) * _unit(parts.flatten(1))).sum(1)


def _details(images: Tensor) -> Tensor:
    """Return images less the mean around each pixel."""
    margin = DETAIL_SIDE // 2
    padded = F.pad(images[:, None], (margin, margin, margin, margin), mode="reflect")
    return images - F.avg_pool2d(padded, DETAIL_SIDE, 1)[:, 0]
