"""Adapted networks do to an image what the stock ones do to its enlargement."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models.swin_transformer import ShiftedWindowAttention

from cifar_transfer.data.geometry import STATISTICS
from cifar_transfer.network.build import build_backbone, build_stock
from cifar_transfer.network.dense_conv import DenseConv2d, HalfMaxPool2d
from cifar_transfer.network.small_images import (
    adapt,
    enlarged_kernel,
    enlarged_patch,
    fold_pooling,
)


def smooth_images(count=8, size=32):
    """Noise with the spectrum of photographs, 1/f."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().clamp_min(1 / size)
    noise = torch.randn(count, 3, size, size, generator=generator)
    images = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    return images / images.std()


def enlarge(images, factor):
    return F.interpolate(images, scale_factor=factor, mode="bilinear")


def features(backbone, images):
    """Return what comes into the heads, float [B, features]."""
    head_inputs = []

    def collect(_, inputs):
        (features,) = inputs
        if features.ndim == 4:
            features = features.mean((2, 3))
        head_inputs.append(features)

    for head in backbone.heads:
        backbone.network.get_submodule(head).register_forward_pre_hook(collect)
    with torch.no_grad():
        backbone.network.eval()(images)
    return torch.cat(head_inputs, dim=1)


def compare_features(name, weights, factor, images):
    """Compare the features of an adapted network with those of the stock one on enlarged images.

    Returns:
        The largest difference as a share of the largest feature, and the mean cosine of the
        deviations from the mean features.
    """
    side = images.shape[-1]
    adapted = build_backbone(name, weights, 10, image_size=side, small_images=True)
    stock = build_backbone(name, weights, 10, image_size=side * factor)
    assert adapted.changes
    actual = features(adapted, images)
    expected = features(stock, enlarge(images, factor) if factor > 1 else images)
    mean = expected.mean(0)
    varies = (expected - mean).norm() > 0.01 * expected.norm()
    assert varies, "features that do not vary show nothing"
    largest = float((actual - expected).abs().max() / expected.abs().max())
    cosine = float(F.cosine_similarity(actual - mean, expected - mean).mean())
    print(f"{name}: largest difference {largest:.4f}, cosine {cosine:.4f}")
    return largest, cosine


@pytest.fixture
def random_weights(tmp_path):
    def write(name):
        torch.manual_seed(0)
        torch.save(build_stock(name).state_dict(), tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return write


# The tolerances are about twice what was measured. Deep random networks with batch-norm magnify
# every difference at the border. They are tested at the stem, and with real weights.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "factor", "tolerance"),
    [
        ("vgg11", 1, 1e-5),
        ("alexnet", 4, 0.05),
        pytest.param("convnext_tiny", 4, 0.2, marks=pytest.mark.whole),
        pytest.param("vit_b_16", 4, 0.3, marks=pytest.mark.whole),
        ("timm/deit_tiny_distilled_patch16_224", 4, 0.5),
        pytest.param("timm/beit_base_patch16_224", 4, 0.6, marks=pytest.mark.whole),
    ],
)
def test_features_stay_those_of_the_enlarged_image(name, factor, tolerance, random_weights):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    largest, cosine = compare_features(name, random_weights(name), factor, smooth_images())
    assert largest < tolerance
    assert cosine > 0.9


@pytest.fixture
def photographs(shared):
    """Return sixteen test images of CIFAR-10, normalised for networks trained on ImageNet."""
    sheet = np.asarray(Image.open(shared / "cifar10" / "test-00.webp").convert("RGB"))[:128, :128]
    tiles = sheet.reshape(4, 32, 4, 32, 3).swapaxes(1, 2).reshape(16, 32, 32, 3)
    images = torch.from_numpy(tiles).movedim(-1, 1)
    mean, std = torch.tensor(STATISTICS["imagenet"]).view(2, 3, 1, 1)
    return (images / 255 - mean) / std


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "factor", "min_cosine"),
    [
        ("resnet18", "resnet18-tinyimagenet.pth", 4, 0.8),
        ("resnet50", "resnet50-imagenet1k.pth", 4, 0.75),
        ("mobilenet_v2", "mobilenet_v2-imagenet1k.pth", 2, 0.9),
    ],
)
def test_real_weights_survive(shared, photographs, name, file, factor, min_cosine):
    weights = str(shared / "weights" / file)
    _, cosine = compare_features(name, weights, factor, photographs)
    assert cosine > min_cosine


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "mobilenet_v3_large",
        "efficientnet_b0",
        "timm/mobilenetv1_100",
        "timm/tf_efficientnet_b0",
    ],
)
def test_a_stem_without_pool_is_the_same_function_inside(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    images = smooth_images()
    network = build_stock(name)
    expected = first_convolution(network)(enlarge(images, 2))
    adapt(network, 32, small_images=True)
    actual = first_convolution(network)(images)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(actual[inner], expected[inner], rtol=1e-4, atol=1e-5)


def first_convolution(network):
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "timm/resnet18"])
def test_a_stem_with_pool_stays_close_inside(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    network = build_stock(name)
    images = smooth_images()
    response = first_convolution(network)(enlarge(images, 4))
    expected_response = response[..., ::2, ::2]
    expected_pooled = F.max_pool2d(response.relu(), 3, 2, 1)
    assert any(isinstance(module, nn.MaxPool2d) for module in network.modules())

    adapt(network, 32, small_images=True)
    stem = first_convolution(network)
    (pool,) = (module for module in network.modules() if isinstance(module, HalfMaxPool2d))
    assert stem.kernel_size == (3, 3)
    assert stem.stride == (1, 1)
    assert not any(isinstance(module, nn.MaxPool2d) for module in network.modules())
    actual_response = stem(images)
    actual_pooled = pool(actual_response.relu())

    inner = (..., slice(2, -2), slice(2, -2))
    difference = (actual_response - expected_response)[inner].abs().max()
    assert difference < 0.1 * expected_response.abs().max()
    assert least_cosine(actual_response[inner], expected_response[inner]) > 0.99
    assert least_cosine(actual_pooled[inner], expected_pooled[inner]) > 0.98
    difference = (actual_pooled - expected_pooled)[inner].norm()
    difference_without_pool = (actual_response.relu() - expected_pooled)[inner].norm()
    assert difference < 0.6 * difference_without_pool


def least_cosine(actual, expected):
    """Return the least cosine over the images of a batch."""
    return F.cosine_similarity(actual.flatten(1), expected.flatten(1)).min()


@pytest.mark.parametrize(
    ("size", "factor", "padding"),
    [(3, 2, 1), (3, 2, 0), (4, 4, 0), (11, 4, 2), (7, 2, 3), (5, 3, 1)],
)
def test_enlarged_kernels_are_exact_inside(size, factor, padding):
    torch.manual_seed(0)
    kernel = torch.randn(5, 3, size, size, dtype=torch.double)
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    expected = F.conv2d(enlarge(images, factor), kernel, stride=factor, padding=padding)
    small_kernel = enlarged_kernel(kernel, factor, -padding)
    actual = F.conv2d(images, small_kernel, padding=small_kernel.shape[-1] // 2)
    side = expected.shape[-1]
    inner = (..., slice(3, side - 3), slice(3, side - 3))
    torch.testing.assert_close(actual[..., :side, :side][inner], expected[inner])


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_enlarged_patches_are_exact(size):
    torch.manual_seed(0)
    kernel = torch.randn(5, 3, 16, 16)
    patch = torch.randn(2, 3, size, size)
    enlarged = F.interpolate(patch, size=(16, 16), mode="bilinear", antialias=True)
    expected = F.conv2d(enlarged, kernel)
    actual = F.conv2d(patch, enlarged_patch(kernel, size))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11_bn", "alexnet"])
@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_folded_classifier_is_the_same_function(name, size):
    if name == "alexnet" and size == 32:
        pytest.skip("AlexNet's stock stem leaves nothing of 32 pixels")
    torch.manual_seed(0)
    network = build_stock(name).eval()
    images = torch.rand(2, 3, size, size)
    expected = network(images)
    changes = fold_pooling(network, size)
    assert bool(changes) == (size < 224)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert fold_pooling(network, size) == [], "nothing is left to be folded"


@pytest.mark.slow
def test_position_embeddings_and_patches_of_any_size():
    torch.manual_seed(0)
    stock = build_stock("vit_b_32")
    weights = stock.state_dict()
    for size, patch in ((32, 4), (48, 8), (224, 32), (32, None)):
        network = models.vit_b_32()
        network.load_state_dict(weights)
        adapt(network, size, patch)
        assert network.eval()(torch.rand(1, 3, size, size)).shape == (1, 1000)
        assert network.encoder.pos_embedding.shape[1] == (size // (patch or 32)) ** 2 + 1
    adapt(stock, 64, 8)
    torch.testing.assert_close(
        stock.encoder.pos_embedding[:, 0], weights["encoder.pos_embedding"][:, 0]
    )


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_swin_windows_divide_the_grids_and_neighbours_keep_their_bias(name):
    torch.manual_seed(0)
    network = build_stock(name)
    attention = attentions(network)[0]
    stock_window = attention.window_size[0]
    stock_bias = attention.get_relative_position_bias().detach()[0]  # [heads, window², window²]

    changes = adapt(network, 32, small_images=True)
    assert "windows of" in changes[-1]
    window = attention.window_size[0]
    bias = attention.get_relative_position_bias().detach()[0]
    for (y, x), (v, u) in (((0, 0), (0, 0)), ((0, 1), (1, 3)), ((3, 2), (0, 0))):
        expected = stock_bias[:, y * stock_window + x, v * stock_window + u]
        torch.testing.assert_close(bias[:, y * window + x, v * window + u], expected)
    first_stage = attentions(network.features[1])
    half_window = first_stage[0].window_size[0] // 2
    assert first_stage[0].shift_size == [0, 0]
    assert first_stage[1].shift_size == [half_window, half_window], "every second block is shifted"
    for stage, grid in ((1, 16), (3, 8), (5, 4), (7, 2)):
        for attention in attentions(network.features[stage]):
            assert grid % attention.window_size[0] == 0
    assert network.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()


def attentions(network):
    return [m for m in network.modules() if isinstance(m, ShiftedWindowAttention)]


def test_swin_with_smaller_patches_is_the_stock_one_on_the_enlarged_image():
    """The images have 56 patches along a side, for which the windows stay the stock ones."""
    torch.manual_seed(0)
    network = build_stock("swin_t").eval()
    images = smooth_images(2, 112)
    with torch.no_grad():
        expected = network(enlarge(images, 2))
        adapt(network, 112, 2, small_images=True)
        actual = network(images)
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "vgg11", "vit_b_32", "swin_t", "alexnet"]
)
def test_adapting_twice_changes_nothing(name):
    network = build_stock(name)
    assert adapt(network, 32, small_images=True)
    adapted_once = {key: value.clone() for key, value in network.state_dict().items()}
    adapt(network, 32, small_images=True)
    for key, value in network.state_dict().items():
        assert torch.equal(value, adapted_once[key]), key


@pytest.mark.parametrize("size", [32, 64, 33, 17])
def test_dense_convolutions_are_the_same_function(size):
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=10).train()
    dense = build_backbone("resnet18", "none", 10).network.train()
    dense.load_state_dict(plain.state_dict())
    dense_layers = [module for module in dense.modules() if isinstance(module, DenseConv2d)]
    assert len(dense_layers) == 17, "all convolutions but the three 1 x 1 shortcuts"
    images = torch.rand(4, 3, size, size)
    plain_logits = plain(images)
    dense_logits = dense(images)
    torch.testing.assert_close(dense_logits, plain_logits, rtol=1e-4, atol=1e-5)
    plain_logits.square().sum().backward()
    dense_logits.square().sum().backward()
    for expected, actual in zip(plain.parameters(), dense.parameters(), strict=True):
        tolerance = 1e-4 * float(expected.grad.abs().max()) + 1e-7
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=tolerance)


def test_only_convolutions_that_see_the_whole_input_everywhere_are_dense(monkeypatch):
    shapes = []
    linear = F.linear

    def record_shape(images, matrix):
        shapes.append(tuple(matrix.shape))
        return linear(images, matrix)

    monkeypatch.setattr(F, "linear", record_shape)
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 1, 1))
    DenseConv2d(4, 8, 3, padding=1, stride=2)(torch.rand(1, 4, 2, 2))
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 2, 2))
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 1, 2))
    assert shapes == [(8, 4), (8, 16), (32, 16), (16, 8)]
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 3, 3))
    DenseConv2d(4, 8, 7, padding=3, stride=2)(torch.rand(1, 4, 8, 8))
    assert len(shapes) == 4, "the last two do not see the whole input"


@pytest.mark.parametrize(
    ("kernel", "padding", "stride", "size"),
    [(3, 1, 1, 2), (3, 1, 2, 2), (5, 2, 1, 3), (3, 1, 2, 1), (3, 2, 2, 2)],
)
def test_dense_convolutions_with_a_bias_and_rectangles(kernel, padding, stride, size):
    torch.manual_seed(0)
    dense = DenseConv2d(3, 4, kernel, padding=padding, stride=stride)
    images = torch.rand(2, 3, size, 1)
    expected = F.conv2d(images, dense.weight, dense.bias, stride, padding)
    torch.testing.assert_close(dense(images), expected)
