"""Train a bidirectional LSTM to recognize which of nine men says the Japanese vowels /ae/.

The data is UCI's Japanese Vowels as the package sktime ships it: 12 LPC cepstrum coefficients a
frame, 7 to 29 frames an utterance, here padded and given with their lengths. The graph is written
as exports of the opset 11 era. Run: python -m models.vowel_lstm.train
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from models.training import Graph, TensorProto, fit, helper, record_score, save_data, torch

nn = torch.nn
FOLDER = Path(__file__).parent
FRAMES, COEFFICIENTS, HIDDEN, SPEAKERS = 29, 12, 96, 9


def utterances(part: str) -> dict[str, np.ndarray]:
    """One official part, TRAIN or TEST. Reads sktime's file without sktime."""
    package = find_spec("sktime")
    assert package is not None and package.origin is not None, "pip install -e '.[train]'"
    data = Path(package.origin).parent / "datasets" / "data" / "JapaneseVowels"
    lines = (data / f"JapaneseVowels_{part}.ts").read_text().split("@data\n")[1].splitlines()
    features = np.zeros((len(lines), FRAMES, COEFFICIENTS), np.float32)
    lengths, labels = np.zeros(len(lines), np.int64), np.zeros(len(lines), np.int64)
    for i, line in enumerate(lines):
        *dimensions, label = line.split(":")
        frames = np.array([[float(v) for v in d.split(",") if v != "?"] for d in dimensions]).T
        features[i, : len(frames)], lengths[i], labels[i] = frames, len(frames), int(label) - 1
    return {"features": features, "lengths": lengths, "labels": labels}


class Direction(nn.Module):
    """One direction of ONNX's LSTM; gates in its order: input, output, forget, cell."""

    def __init__(self) -> None:
        super().__init__()
        bound = HIDDEN**-0.5
        self.w, self.r, self.b = (
            nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            for shape in ((4 * HIDDEN, COEFFICIENTS), (4 * HIDDEN, HIDDEN), (4 * HIDDEN,))
        )

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The hidden state after each sequence's own last frame: [N, HIDDEN]."""
        h = c = x.new_zeros(len(x), HIDDEN)
        for t, term in enumerate((x @ self.w.T + self.b).unbind(1)):
            i, o, f, g = (term + h @ self.r.T).chunk(4, 1)
            cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
            live = (t < lengths)[:, None]
            h, c = torch.where(live, o.sigmoid() * cell.tanh(), h), torch.where(live, cell, c)
        return h


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.directions = nn.ModuleList([Direction(), Direction()])
        self.fc = nn.Linear(2 * HIDDEN, SPEAKERS)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        frame = torch.arange(x.shape[1]).expand(len(x), -1)
        mirrored = torch.where(frame < lengths[:, None], lengths[:, None] - 1 - frame, frame)
        backward = x.gather(1, mirrored[..., None].expand_as(x))
        states = [d(s, lengths) for d, s in zip(self.directions, (x, backward), strict=True)]
        return self.fc(torch.cat(states, 1))

    def export(self, g: Graph) -> None:
        w, r, b = (torch.stack([getattr(d, n) for d in self.directions]) for n in "wrb")
        b = torch.cat([b, torch.zeros_like(b)], 1)
        weights = [g.weight(f"lstm.{n}", value) for n, value in (("W", w), ("R", r), ("B", b))]
        x = g.node("Transpose", ["features"], "Transpose_0", perm=[1, 0, 2])
        lengths = g.node("Cast", ["lengths"], "Cast_1", to=TensorProto.INT32)
        lstm = helper.make_node(
            "LSTM",
            [x, *weights, lengths],
            ["", "LSTM_2_hidden"],
            "LSTM_2",
            direction="bidirectional",
            hidden_size=HIDDEN,
        )
        g.nodes.append(lstm)
        indices = [g.constant(f"direction.{i}", np.array(i)) for i in (-2, -1)]
        states = [
            g.node("Gather", ["LSTM_2_hidden", index], f"Gather_{3 + i}", axis=0)
            for i, index in enumerate(indices)
        ]
        x = g.node("Concat", states, "Concat_5", axis=1)
        g.node("Identity", [g.linear(x, self.fc, "fc")], "Identity_7", "logits")


def main() -> None:
    learn, judge = utterances("TRAIN"), utterances("TEST")
    x = torch.from_numpy(learn["features"]).double()
    lengths, y = torch.from_numpy(learn["lengths"]), torch.from_numpy(learn["labels"])
    net = Net()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    fit(
        net.parameters(),
        lambda batch: criterion(net(x[batch], lengths[batch]), y[batch]),
        len(x),
        epochs=40,
        batch_size=30,
        learning_rate=4e-3,
    )
    graph = Graph()
    net.export(graph)
    graph.save(
        FOLDER / "model.onnx",
        {
            "features": (TensorProto.FLOAT, ["N", "T", COEFFICIENTS]),
            "lengths": (TensorProto.INT64, ["N"]),
        },
        {"logits": ["N", SPEAKERS]},
        opset=11,
        ir_version=6,
    )
    # The official parts are all there is: calibration takes every third of the training utterances.
    calibration = {n: learn[n][::3] for n in ("features", "lengths")}
    save_data(FOLDER, calibration, judge)
    record_score(FOLDER)


if __name__ == "__main__":
    main()
