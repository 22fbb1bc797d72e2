"""Train a small transformer encoder to tell in which language a name is written, from its bytes.

The names of countries, languages, currencies and scripts come from the Unicode CLDR as Babel
ships it, in twenty languages of the Latin script. The graph is written as BERT exports of the
opset 13 era: LayerNorm and Gelu in their parts, an additive mask, masked mean pooling.
Run: python -m models.name_language.train
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from babel import Locale

from models.training import Graph, TensorProto, fit, record_score, save_data, torch

nn = torch.nn
FOLDER = Path(__file__).parent
LANGUAGES = """
    ca cs da de en es et fi fr gl
    hr it nb nl pl pt ro sk sl sv
""".split()  # noqa: SIM905
LENGTH = 24
WIDTH, HEADS, LAYERS = 64, 4, 3
FIRST_BYTE = 3  # ids 0 to 2 are padding and two reserved, as in ByT5


def names() -> list[tuple[str, int, str]]:
    """(concept, language, name), without the names that several languages share."""
    found: list[tuple[str, int, str]] = []
    for i, language in enumerate(LANGUAGES):
        locale = Locale(language)
        for kind in ("territories", "languages", "currencies", "scripts"):
            words = sorted(getattr(locale, kind).items())
            found += [(f"{kind}:{code}", i, word) for code, word in words]
    shared = Counter(word.casefold() for _, _, word in found)
    fits = range(4, LENGTH + 1)
    return [n for n in found if shared[n[2].casefold()] == 1 and len(n[2].encode()) in fits]


def encode(words: list[str]) -> dict[str, np.ndarray]:
    ids = np.zeros((len(words), LENGTH), np.int64)
    for row, word in zip(ids, words, strict=True):
        row[: len(word.encode())] = np.frombuffer(word.encode(), np.uint8).astype(int) + FIRST_BYTE
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


class Layer(nn.Module):
    """Attention and feed-forward, each followed by addition and normalization, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            project(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5 + mask
        y = (scores.softmax(3) @ v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dense(y))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))

    def export(self, g: Graph, x: str, mask: str, scope: str) -> str:
        attention = f"{scope}/attention"
        q, k, v = (
            heads(g, linear(g, x, getattr(self, n), f"{attention}/{n}"), f"{attention}/{n}", order)
            for n, order in (
                ("query", [0, 2, 1, 3]),
                ("key", [0, 2, 3, 1]),
                ("value", [0, 2, 1, 3]),
            )
        )
        scale = g.constant("attention.scale", np.float32((WIDTH // HEADS) ** 0.5))
        y = g.node("MatMul", [q, k], f"{attention}/MatMul")
        y = g.node("Div", [y, scale], f"{attention}/Div")
        y = g.node("Add", [y, mask], f"{attention}/Add")
        y = g.node("Softmax", [y], f"{attention}/Softmax", axis=-1)
        y = g.node("MatMul", [y, v], f"{attention}/MatMul_1")
        y = g.node("Transpose", [y], f"{attention}/Transpose_3", perm=[0, 2, 1, 3])
        shape = g.constant("attention.merge", np.array([0, 0, WIDTH]))
        y = g.node("Reshape", [y, shape], f"{attention}/Reshape_3")
        y = linear(g, y, self.dense, f"{attention}/dense")
        x = g.node("Add", [y, x], f"{attention}/Add_1")
        x = layer_norm(g, x, self.norm1, f"{attention}/LayerNorm")
        y = gelu(g, linear(g, x, self.up, f"{scope}/intermediate/dense"), f"{scope}/intermediate")
        y = g.node(
            "Add", [linear(g, y, self.down, f"{scope}/output/dense"), x], f"{scope}/output/Add"
        )
        return layer_norm(g, y, self.norm2, f"{scope}/output/LayerNorm")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.position = (
            nn.Embedding(256 + FIRST_BYTE, WIDTH),
            nn.Embedding(LENGTH, WIDTH),
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.classifier = nn.Linear(WIDTH, len(LANGUAGES))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.double()
        x = self.norm(self.word(ids) + self.position.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, (1 - mask[:, None, None, :]) * -1e4)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.classifier(mean)

    def export(self, g: Graph) -> None:
        x = layer_norm(g, self.export_embeddings(g), self.norm, "/embeddings/LayerNorm")
        mask = extended_mask(g)
        for i, layer in enumerate(self.layers):
            x = layer.export(g, x, mask, f"/encoder/layer.{i}")
        x = mean_pool(g, x)
        g.node("Identity", [g.linear(x, self.classifier, "/classifier")], "/Identity", "logits")

    def export_embeddings(self, g: Graph) -> str:
        word = g.weight("embeddings.word_embeddings.weight", self.word.weight)
        position = g.weight("embeddings.position_embeddings.weight", self.position.weight)
        words = g.node("Gather", [word, "input_ids"], "/embeddings/word_embeddings/Gather")
        one, zero = g.constant("one", np.array([1])), g.constant("zero", np.array([0]))
        every = g.constant("embeddings.position_ids", np.arange(LENGTH)[None])
        shape = g.node("Shape", ["input_ids"], "/embeddings/Shape")
        length = g.node("Gather", [shape, one], "/embeddings/Gather", axis=0)
        ids = g.node("Slice", [every, zero, length, one], "/embeddings/Slice")
        places = g.node("Gather", [position, ids], "/embeddings/position_embeddings/Gather")
        return g.node("Add", [words, places], "/embeddings/Add")


def heads(g: Graph, x: str, scope: str, order: list[int]) -> str:
    shape = g.constant("attention.split", np.array([0, 0, HEADS, WIDTH // HEADS]))
    x = g.node("Reshape", [x, shape], f"{scope}/Reshape")
    return g.node("Transpose", [x], f"{scope}/Transpose", perm=order)


def linear(g: Graph, x: str, layer: nn.Linear, scope: str) -> str:
    """`MatMul` and `Add`, as a framework writes a linear layer of a 3-D tensor."""
    module = scope.strip("/").replace("/", ".")
    weight = g.weight(f"{module}.weight_transposed", layer.weight.T)
    x = g.node("MatMul", [x, weight], f"{scope}/MatMul")
    return g.node("Add", [g.weight(f"{module}.bias", layer.bias), x], f"{scope}/Add")


def gelu(g: Graph, x: str, scope: str) -> str:
    root, one, half = (
        g.constant(f"gelu.{n}", np.float32(v))
        for n, v in (("root", 2**0.5), ("one", 1), ("half", 0.5))
    )
    y = g.node("Div", [x, root], f"{scope}/act/Div")
    y = g.node("Erf", [y], f"{scope}/act/Erf")
    y = g.node("Add", [y, one], f"{scope}/act/Add")
    y = g.node("Mul", [x, y], f"{scope}/act/Mul")
    return g.node("Mul", [y, half], f"{scope}/act/Mul_1")


def layer_norm(g: Graph, x: str, norm: nn.LayerNorm, scope: str) -> str:
    module = scope.strip("/").replace("/", ".")
    two, epsilon = (
        g.constant("norm.two", np.float32(2)),
        g.constant("norm.eps", np.float32(norm.eps)),
    )
    mean = g.node("ReduceMean", [x], f"{scope}/ReduceMean", axes=[-1])
    x = g.node("Sub", [x, mean], f"{scope}/Sub")
    y = g.node("Pow", [x, two], f"{scope}/Pow")
    y = g.node("ReduceMean", [y], f"{scope}/ReduceMean_1", axes=[-1])
    y = g.node("Add", [y, epsilon], f"{scope}/Add")
    y = g.node("Sqrt", [y], f"{scope}/Sqrt")
    y = g.node("Div", [x, y], f"{scope}/Div")
    y = g.node("Mul", [y, g.weight(f"{module}.weight", norm.weight)], f"{scope}/Mul")
    return g.node("Add", [y, g.weight(f"{module}.bias", norm.bias)], f"{scope}/Add_1")


def extended_mask(g: Graph) -> str:
    """0 where there is a byte, -10000 where there is padding: [N, 1, 1, L]."""
    one, low = g.constant("mask.one", np.float32(1)), g.constant("mask.low", np.float32(-1e4))
    axes = g.constant("mask.axes", np.array([1, 2]))
    mask = g.node("Unsqueeze", ["attention_mask", axes], "/Unsqueeze")
    mask = g.node("Cast", [mask], "/Cast", to=TensorProto.FLOAT)
    return g.node("Mul", [g.node("Sub", [one, mask], "/Sub"), low], "/Mul")


def mean_pool(g: Graph, x: str) -> str:
    """The mean over the bytes that are not padding: [N, WIDTH]."""
    last, axis = g.constant("pool.last", np.array([-1])), g.constant("pool.axis", np.array([1]))
    mask = g.node("Cast", ["attention_mask"], "/pooling/Cast", to=TensorProto.FLOAT)
    mask = g.node("Unsqueeze", [mask, last], "/pooling/Unsqueeze")
    total = g.node("Mul", [x, mask], "/pooling/Mul")
    total = g.node("ReduceSum", [total, axis], "/pooling/ReduceSum", keepdims=0)
    count = g.node("ReduceSum", [mask, axis], "/pooling/ReduceSum_1", keepdims=0)
    return g.node("Div", [total, count], "/pooling/Div")


def pick(found: list[tuple[str, int, str]], concepts: list[str]) -> tuple[list[str], np.ndarray]:
    """Names and languages of some concepts, in the order of `found`."""
    wanted = set(concepts)
    chosen = [(word, language) for concept, language, word in found if concept in wanted]
    return [word for word, _ in chosen], np.array([language for _, language in chosen])


def main() -> None:
    found = names()
    rng = np.random.default_rng(0)
    # Split by concept, so that no name of a judged country was seen in a neighbouring language.
    concepts = rng.permutation(sorted({concept for concept, _, _ in found})).tolist()
    a, b = len(concepts) * 86 // 100, len(concepts) * 89 // 100
    learn, tune, judge = (pick(found, part) for part in (concepts[:a], concepts[a:b], concepts[b:]))

    feeds, y = encode(learn[0]), torch.from_numpy(learn[1])
    ids, mask = (torch.from_numpy(feed) for feed in feeds.values())
    net = Encoder()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)

    # Batches of names of about one length, so that little time goes into padding.
    mixed = rng.permutation(len(y))
    by_length = mixed[np.argsort(mask.sum(1).numpy()[mixed], kind="stable")]
    batches = by_length[: len(by_length) // 64 * 64].reshape(-1, 64)

    def loss_of(chosen: np.ndarray) -> torch.Tensor:
        batch = batches[chosen[0]]
        longest = int(mask[batch].sum(1).max())
        return criterion(net(ids[batch, :longest], mask[batch, :longest]), y[batch])

    fit(net.parameters(), loss_of, len(batches), epochs=7, batch_size=1, learning_rate=2e-3)
    graph = Graph()
    net.export(graph)
    graph.save(
        FOLDER / "model.onnx",
        {n: (TensorProto.INT64, ["N", "L"]) for n in ("input_ids", "attention_mask")},
        {"logits": ["N", len(LANGUAGES)]},
        opset=13,
        ir_version=7,
    )
    kept, tuned = (rng.permutation(len(part[1]))[:n] for part, n in ((judge, 1000), (tune, 128)))
    evaluation = encode([judge[0][i] for i in kept])
    calibration = encode([tune[0][i] for i in tuned])
    save_data(FOLDER, calibration, {**evaluation, "labels": judge[1][kept]})
    record_score(FOLDER)


if __name__ == "__main__":
    main()
