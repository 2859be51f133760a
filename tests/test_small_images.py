"""Adapted networks do on an image what the stock ones do on its enlargement."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models.swin_transformer import ShiftedWindowAttention

from cifar_transfer.data.geometry import STATISTICS
from cifar_transfer.network import build
from cifar_transfer.network.dense_conv import DenseConv2d, HalfMaxPool2d
from cifar_transfer.network.small_images import adapt, enlarged_kernel, enlarged_patch


def smooth_images(count=8, size=32):
    """Noise with the spectrum of photographs, 1/f."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().clamp_min(1 / size)
    noise = torch.randn(count, 3, size, size, generator=generator)
    images = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    return images / images.std()


def features(built, images):
    """What the heads see, [B, features]."""
    seen = []
    hooks = [
        built.network.get_submodule(head).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        for head in built.heads
    ]
    with torch.no_grad():
        built.network.eval()(images)
    for hook in hooks:
        hook.remove()
    return torch.cat([f.mean((2, 3)) if f.ndim == 4 else f for f in seen], dim=1)


def difference(name, weights, factor, images):
    """Largest difference of a feature, as a share of the largest, and the mean cosine, both of what varies."""
    size = images.shape[-1]
    adapted = build.build(name, weights, 10, image_size=size, small=True)
    stock = build.build(name, weights, 10, image_size=size * factor)
    assert adapted.changes
    enlarged = F.interpolate(images, scale_factor=factor, mode="bilinear") if factor > 1 else images
    ours, theirs = features(adapted, images), features(stock, enlarged)
    mean = theirs.mean(0)
    assert (theirs - mean).norm() > 0.01 * theirs.norm(), "features that do not vary show nothing"
    largest = float((ours - theirs).abs().max() / theirs.abs().max())
    cosine = float(F.cosine_similarity(ours - mean, theirs - mean).mean())
    print(f"{name}: largest difference {largest:.4f}, cosine {cosine:.4f}")
    return largest, cosine


@pytest.fixture
def random_weights(tmp_path):
    def write(name):
        torch.manual_seed(0)
        torch.save(build.stock(name).state_dict(), tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return write


# The tolerances are about twice what was measured. Deep random networks with batch-norm blow every difference at the
# border up, so that theirs are seen at the stem, and with real weights.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "factor", "largest"),
    [
        ("vgg11", 1, 1e-5),
        ("alexnet", 4, 0.05),
        ("convnext_tiny", 4, 0.2),
        ("vit_b_16", 4, 0.3),
        ("timm/deit_tiny_distilled_patch16_224", 4, 0.5),
        ("timm/beit_base_patch16_224", 4, 0.6),
    ],
)
def test_features_stay_those_of_the_enlarged_image(name, factor, largest, random_weights):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    found, cosine = difference(name, random_weights(name), factor, smooth_images())
    assert found < largest
    assert cosine > 0.9


@pytest.fixture
def photographs(shared):
    """Sixteen test images, normalised for ImageNet's networks."""
    sheet = np.asarray(Image.open(shared / "cifar10" / "test-00.webp").convert("RGB"))[:128, :128]
    images = torch.from_numpy(
        sheet.reshape(4, 32, 4, 32, 3).swapaxes(1, 2).reshape(16, 32, 32, 3)
    ).movedim(-1, 1)
    mean, std = (torch.tensor(triple).view(3, 1, 1) for triple in STATISTICS["imagenet"])
    return (images / 255 - mean) / std


@pytest.mark.parametrize(
    ("name", "file", "factor", "least"),
    [
        ("resnet18", "resnet18-tinyimagenet.pth", 4, 0.8),
        ("resnet50", "resnet50-imagenet1k.pth", 4, 0.75),
        ("mobilenet_v2", "mobilenet_v2-imagenet1k.pth", 2, 0.9),
    ],
)
def test_real_weights_survive(shared, photographs, name, file, factor, least):
    assert difference(name, str(shared / "weights" / file), factor, photographs)[1] > least


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
    network = build.stock(name)
    expected = first_convolution(network)(F.interpolate(images, scale_factor=2, mode="bilinear"))
    adapt(network, 32, small=True)
    found = first_convolution(network)(images)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inner], expected[inner], rtol=1e-4, atol=1e-5)


def first_convolution(network):
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "timm/resnet18"])
def test_a_stem_with_pool_stays_close_inside(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    network, images = build.stock(name), smooth_images()
    response = first_convolution(network)(F.interpolate(images, scale_factor=4, mode="bilinear"))
    unpooled, expected = response[..., ::2, ::2], F.max_pool2d(response.relu(), 3, 2, 1)
    assert [m for m in network.modules() if isinstance(m, nn.MaxPool2d)]
    adapt(network, 32, small=True)
    stem = first_convolution(network)
    (pool,) = (m for m in network.modules() if isinstance(m, HalfMaxPool2d))
    assert (stem.kernel_size, stem.stride) == ((3, 3), (1, 1))
    assert not [m for m in network.modules() if isinstance(m, nn.MaxPool2d)]
    inner = (..., slice(2, -2), slice(2, -2))
    found = stem(images)
    assert (found - unpooled)[inner].abs().max() < 0.1 * unpooled.abs().max()
    assert F.cosine_similarity(found[inner].flatten(1), unpooled[inner].flatten(1)).min() > 0.99
    pooled = pool(found.relu())
    assert F.cosine_similarity(pooled[inner].flatten(1), expected[inner].flatten(1)).min() > 0.98
    lost = (found.relu() - expected)[inner].norm()
    assert (pooled - expected)[inner].norm() < 0.6 * lost, "much nearer than no pooling at all"


@pytest.mark.parametrize(
    ("size", "factor", "padding"),
    [(3, 2, 1), (3, 2, 0), (4, 4, 0), (11, 4, 2), (7, 2, 3), (5, 3, 1)],
)
def test_enlarged_kernels_are_exact_inside(size, factor, padding):
    torch.manual_seed(0)
    kernel, images = (
        torch.randn(5, 3, size, size, dtype=torch.double),
        torch.randn(2, 3, 16, 16, dtype=torch.double),
    )
    enlarged = F.interpolate(images, scale_factor=factor, mode="bilinear")
    expected = F.conv2d(enlarged, kernel, stride=factor, padding=padding)
    small = enlarged_kernel(kernel, factor, -padding)
    found = F.conv2d(images, small, padding=small.shape[-1] // 2)
    side = expected.shape[-1]
    inner = (..., slice(3, side - 3), slice(3, side - 3))
    torch.testing.assert_close(found[..., :side, :side][inner], expected[inner])


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_enlarged_patches_are_exact(size):
    torch.manual_seed(0)
    kernel, patch = torch.randn(5, 3, 16, 16), torch.randn(2, 3, size, size)
    expected = F.conv2d(
        F.interpolate(patch, size=(16, 16), mode="bilinear", antialias=True), kernel
    )
    torch.testing.assert_close(
        F.conv2d(patch, enlarged_patch(kernel, size)), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["vgg11_bn", "alexnet"])
@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_folded_classifier_is_the_same_function(name, size):
    if name == "alexnet" and size == 32:
        pytest.skip("AlexNet's stock stem leaves nothing of 32 pixels")
    torch.manual_seed(0)
    network = build.stock(name).eval()
    images = torch.rand(2, 3, size, size)
    expected = network(images)
    from cifar_transfer.network.small_images import _classifier

    changes = _classifier(network, size)
    assert bool(changes) == (size < 224)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert not _classifier(network, size), "once is enough"


def test_position_embeddings_and_patches_of_any_size(random_weights):
    torch.manual_seed(0)
    stock = build.stock("vit_b_32")
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
    network = build.stock(name)
    block = next(m for m in network.modules() if isinstance(m, ShiftedWindowAttention))
    old, before = (
        block.window_size[0],
        block.get_relative_position_bias().detach()[0],
    )  # [heads, old², old²]
    changes = adapt(network, 32, small=True)
    assert "windows of" in changes[-1]
    window = block.window_size[0]
    after = block.get_relative_position_bias().detach()[0]
    for (y, x), (v, u) in (((0, 0), (0, 0)), ((0, 1), (1, 3)), ((3, 2), (0, 0))):
        expected = before[:, y * old + x, v * old + u]
        torch.testing.assert_close(after[:, y * window + x, v * window + u], expected)
    grids = [16, 8, 4, 2]
    attentions = [
        [m for m in stage.modules() if isinstance(m, ShiftedWindowAttention)]
        for stage in network.features
    ]
    windows = [stage[0].window_size[0] for stage in attentions if stage]
    assert all(grid % window == 0 for grid, window in zip(grids, windows, strict=True))
    shifts = [[attention.shift_size for attention in stage] for stage in attentions if stage]
    assert shifts[0] == [[0, 0], [windows[0] // 2] * 2], "every second block by half a window"
    assert network.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()


def test_swin_with_smaller_patches_is_the_stock_one_on_the_enlarged_image():
    """At a size where the windows are the stock ones: 56 patches along a side."""
    torch.manual_seed(0)
    network = build.stock("swin_t").eval()
    images = smooth_images(2, 112)
    with torch.no_grad():
        expected = network(F.interpolate(images, scale_factor=2, mode="bilinear"))
        adapt(network, 112, 2, small=True)
        found = network(images)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_adapting_twice_changes_nothing():
    for name in ("resnet18", "mobilenet_v2", "vgg11", "vit_b_32", "swin_t", "alexnet"):
        network = build.stock(name)
        assert adapt(network, 32, small=True)
        state = {key: value.clone() for key, value in network.state_dict().items()}
        adapt(network, 32, small=True)
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items()), (
            name
        )


@pytest.mark.parametrize("size", [32, 64, 33, 17])
def test_dense_convolutions_are_the_same_function(size):
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=10)
    ours = build.build("resnet18", "none", 10).network
    ours.load_state_dict(plain.state_dict())
    assert sum(isinstance(m, DenseConv2d) for m in ours.modules()) == 17, (
        "all but the three 1 x 1 shortcuts"
    )
    images = torch.rand(4, 3, size, size)
    results = []
    for network in (plain.train(), ours.train()):
        logits = network(images)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in network.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-7)


def test_only_convolutions_that_see_all_everywhere_are_dense(monkeypatch):
    products, linear = [], nn.functional.linear
    monkeypatch.setattr(
        "torch.nn.functional.linear", lambda x, w: products.append(tuple(w.shape)) or linear(x, w)
    )
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 1, 1))
    DenseConv2d(4, 8, 3, padding=1, stride=2)(torch.rand(1, 4, 2, 2))
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 2, 2))
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 1, 2))
    assert products == [(8, 4), (8, 16), (32, 16), (16, 8)]
    DenseConv2d(4, 8, 3, padding=1)(torch.rand(1, 4, 3, 3))
    DenseConv2d(4, 8, 7, padding=3, stride=2)(torch.rand(1, 4, 8, 8))
    assert len(products) == 4


@pytest.mark.parametrize(
    ("kernel", "padding", "stride", "size"),
    [(3, 1, 1, 2), (3, 1, 2, 2), (5, 2, 1, 3), (3, 1, 2, 1), (3, 2, 2, 2)],
)
def test_dense_convolutions_with_a_bias_and_rectangles(kernel, padding, stride, size):
    torch.manual_seed(0)
    conv = DenseConv2d(3, 4, kernel, padding=padding, stride=stride)
    images = torch.rand(2, 3, size, 1)
    want = nn.functional.conv2d(images, conv.weight, conv.bias, stride, padding)
    torch.testing.assert_close(conv(images), want)
