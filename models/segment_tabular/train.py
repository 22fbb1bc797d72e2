"""Train a residual network on a table: which of seven surfaces a patch of a photograph shows.

The data is UCI's Image Segmentation as the package river ships it. Features enter as measured, so
the graph starts with their standardization; LayerNormalization and Gelu are single operators, as
exporters write them from opset 20. Run: python -m models.segment_tabular.train
"""

from __future__ import annotations

import csv
import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from models.training import Graph, TensorProto, fit, record_score, save_data, torch

nn = torch.nn
FOLDER = Path(__file__).parent
WIDTH, HIDDEN, BLOCKS = 128, 192, 2


def table() -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n, 18] and classes int64 [n], each patch once (the file repeats some)."""
    package = find_spec("river")
    assert package is not None and package.origin is not None, "pip install -e '.[train]'"
    with zipfile.ZipFile(Path(package.origin).parent / "datasets" / "segment.csv.zip") as archive:
        text = archive.read(archive.namelist()[0]).decode()
    rows = [list(row) for row in dict.fromkeys(map(tuple, csv.reader(io.StringIO(text))))][1:]
    classes = sorted({row[-1] for row in rows})
    features = np.array([[float(v) for v in row[:-1]] for row in rows])
    return features.astype(np.float32), np.array([classes.index(row[-1]) for row in rows])


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))), the block of Gorishniy et al. (2021) without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    def export(self, g: Graph, x: str, scope: str) -> str:
        y = g.linear(layer_norm(g, x, self.norm, f"{scope}/norm"), self.up, f"{scope}/up")
        y = g.linear(g.node("Gelu", [y], f"{scope}/Gelu"), self.down, f"{scope}/down")
        return g.node("Add", [x, y], f"{scope}/Add")


class Net(nn.Module):
    def __init__(self, features: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.mean, self.std = features.mean(0), features.std(0)
        self.stem = nn.Linear(features.shape[1], WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem((x - self.mean) / self.std)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def export(self, g: Graph) -> None:
        x = g.node("Sub", ["features", g.weight("mean", self.mean)], "/Sub")
        x = g.node("Div", [x, g.weight("std", self.std)], "/Div")
        x = g.linear(x, self.stem, "/stem")
        for i, block in enumerate(self.blocks):
            x = block.export(g, x, f"/blocks.{i}")
        x = g.linear(layer_norm(g, x, self.norm, "/norm"), self.head, "/head")
        g.node("Identity", [x], "/Identity", "logits")


def layer_norm(g: Graph, x: str, norm: nn.LayerNorm, scope: str) -> str:
    module = scope.strip("/").replace("/", ".")
    weights = [g.weight(f"{module}.{n}", p) for n, p in norm.named_parameters()]
    name = f"{scope}/LayerNormalization"
    return g.node("LayerNormalization", [x, *weights], name, axis=-1, epsilon=norm.eps)


def main() -> None:
    features, labels = table()
    order = np.random.default_rng(0).permutation(len(labels))
    learn, tune, judge = np.split(order, [1050, 1186])
    x, y = torch.from_numpy(features[learn]).double(), torch.from_numpy(labels[learn])
    net = Net(x, int(labels.max()) + 1)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    fit(
        net.parameters(),
        lambda batch: criterion(net(x[batch]), y[batch]),
        len(x),
        epochs=60,
        batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.1,
    )
    graph = Graph()
    net.export(graph)
    graph.save(
        FOLDER / "model.onnx",
        {"features": (TensorProto.FLOAT, ["N", features.shape[1]])},
        {"logits": ["N", net.head.out_features]},
        opset=20,
        ir_version=9,
    )
    save_data(
        FOLDER,
        {"features": features[tune]},
        {"features": features[judge], "labels": labels[judge]},
    )
    record_score(FOLDER)


if __name__ == "__main__":
    main()
