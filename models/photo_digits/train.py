"""Train a residual convolutional net to read handwritten digits over photographs.

The digits and both photographs are scikit-learn's; a digit is turned, scaled, moved and blended
by absolute difference, as in MNIST-M (Ganin et al., 2016). Run: python -m models.photo_digits.train
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, load_sample_images

from models.training import Graph, TensorProto, fit, record_score, save_data, torch

nn = torch.nn
FOLDER = Path(__file__).parent
SIZE = 24
LEVELS = 16  # grey levels of the digits; the pictures keep them, which also keeps the files small


def backgrounds() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both photographs in grey, half size: their left parts to train on, right parts to judge."""
    grey = [
        p[::2, ::2] @ np.array([0.299, 0.587, 0.114]) / 255 for p in load_sample_images().images
    ]
    return [p[:, :220] for p in grey], [p[:, 220:] for p in grey]


def render(digits: np.ndarray, photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Digits [n, 8, 8] in 0..1 over random crops of the photographs: [n, 1, SIZE, SIZE] in 0..1."""
    n = len(digits)
    angle, scale = rng.uniform(-0.35, 0.35, n), rng.uniform(1.8, 2.7, n)
    shift, gain = rng.uniform(-2.5, 2.5, (2, n)), rng.uniform(0.55, 1.0, n)
    grid = np.arange(SIZE) - (SIZE - 1) / 2
    y = grid[None, :, None] - shift[0][:, None, None]
    x = grid[None, None, :] - shift[1][:, None, None]
    cos, sin = (f(angle)[:, None, None] / scale[:, None, None] for f in (np.cos, np.sin))
    ink = sample(digits, cos * y - sin * x + 3.5, sin * y + cos * x + 3.5) * gain[:, None, None]
    behind = np.stack([crop(photos[rng.integers(len(photos))], rng) for _ in range(n)])
    return (np.round(np.abs(behind - ink) * LEVELS) / LEVELS)[:, None].astype(np.float32)


def sample(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear samples of images [n, 8, 8] at y, x [n, h, w]; zero outside."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    y, x = np.clip(y + 1, 0, 8.999), np.clip(x + 1, 0, 8.999)
    i, j = y.astype(int), x.astype(int)
    y, x, k = y - i, x - j, np.arange(len(images))[:, None, None]
    top = padded[k, i, j] * (1 - x) + padded[k, i, j + 1] * x
    bottom = padded[k, i + 1, j] * (1 - x) + padded[k, i + 1, j + 1] * x
    return top * (1 - y) + bottom * y


def crop(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top, left = (rng.integers(side - SIZE + 1) for side in photo.shape)
    return photo[top : top + SIZE, left : left + SIZE]


class ConvNorm(nn.Sequential):
    """Convolution without bias, batchnorm."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out))


class Basic(nn.Module):
    """The residual block of ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(channels, channels, 3), ConvNorm(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))

    def export(self, g: Graph, x: str, scope: str) -> str:
        y = g.node("Relu", [export(g, self.conv1, x, f"{scope}/conv1")], f"{scope}/relu/Relu")
        y = g.node("Add", [x, export(g, self.conv2, y, f"{scope}/conv2")], f"{scope}/Add")
        return g.node("Relu", [y], f"{scope}/relu_1/Relu")


class Inverted(nn.Module):
    """The inverted residual of MobileNetV2: widen, depthwise, narrow; ReLU6 between."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.expand = ConvNorm(c_in, 3 * c_in, 1)
        self.depthwise = ConvNorm(3 * c_in, 3 * c_in, 3, stride, groups=3 * c_in)
        self.project = ConvNorm(3 * c_in, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand(x).clamp(0, 6)
        y = self.project(self.depthwise(y).clamp(0, 6))
        return x + y if self.residual else y

    def export(self, g: Graph, x: str, scope: str) -> str:
        bounds = [g.constant(n, np.float32(v)) for n, v in (("relu6.min", 0), ("relu6.max", 6))]
        y = export(g, self.expand, x, f"{scope}/expand")
        y = g.node("Clip", [y, *bounds], f"{scope}/relu6/Clip")
        y = export(g, self.depthwise, y, f"{scope}/depthwise")
        y = g.node("Clip", [y, *bounds], f"{scope}/relu6_1/Clip")
        y = export(g, self.project, y, f"{scope}/project")
        return g.node("Add", [x, y], f"{scope}/Add") if self.residual else y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 32, 3, stride=2)
        self.blocks = nn.Sequential(Basic(32), Inverted(32, 64, 2), Inverted(64, 64, 1), Basic(64))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))

    def export(self, g: Graph) -> None:
        x = g.node("Relu", [export(g, self.stem, "image", "/stem")], "/relu/Relu")
        for i, block in enumerate(self.blocks):
            x = block.export(g, x, f"/blocks/{i}")
        x = g.node("GlobalAveragePool", [x], "/pool/GlobalAveragePool")
        x = g.node("Flatten", [x], "/Flatten", axis=1)
        g.node("Identity", [g.linear(x, self.fc, "/fc")], "/Identity", "logits")


def export(g: Graph, unit: ConvNorm, x: str, scope: str) -> str:
    conv, norm = unit
    module = scope.strip("/").replace("/", ".")
    weight = g.weight(f"{module}.conv.weight", conv.weight)
    pads = [conv.padding[0], conv.padding[1]] * 2
    x = g.node(
        "Conv",
        [x, weight],
        f"{scope}/conv/Conv",
        dilations=[1, 1],
        group=conv.groups,
        kernel_shape=list(conv.kernel_size),
        pads=pads,
        strides=list(conv.stride),
    )
    names = ("weight", "bias", "running_mean", "running_var")
    terms = [g.weight(f"{module}.norm.{n}", getattr(norm, n)) for n in names]
    return g.node(
        "BatchNormalization", [x, *terms], f"{scope}/norm/BatchNormalization", epsilon=1e-5
    )


def main() -> None:
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    images, order = images.reshape(-1, 8, 8) / 16, rng.permutation(len(labels))
    learn, tune, judge = np.split(order, [1150, 1297])
    seen, unseen = backgrounds()

    drawn = np.tile(learn, 24)
    x = torch.from_numpy(render(images[drawn], seen, rng)).double()
    y = torch.from_numpy(labels[drawn])
    net = Net()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    fit(
        net.parameters(),
        lambda batch: criterion(net(x[batch]), y[batch]),
        len(x),
        epochs=1,
        batch_size=48,
        learning_rate=4e-3,
    )
    net.eval()
    graph = Graph()
    net.export(graph)
    graph.save(
        FOLDER / "model.onnx",
        {"image": (TensorProto.FLOAT, ["N", 1, SIZE, SIZE])},
        {"logits": ["N", 10]},
        opset=17,
        ir_version=8,
    )
    judge = np.tile(judge, 2)
    save_data(
        FOLDER,
        {"image": render(images[tune], seen, rng)},
        {"image": render(images[judge], unseen, rng), "labels": labels[judge]},
    )
    record_score(FOLDER)


if __name__ == "__main__":
    main()
