"""`Model`: train, predict, save and load, and what it says of unsuitable arguments."""

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxcompress as oc
from onnxcompress.errors import GateError, InputError
from onnxcompress.recipe import Recipe
from onnxcompress.train.augment import Compose, Mixup, Noise, Swap
from onnxcompress.train.clean import Cleaner, Detector
from onnxcompress.train.losses import CrossEntropy, MeanSquared
from onnxcompress.train.optimizers import AdamW
from onnxcompress.train.schedules import linear, stepped, warm_up
from onnxcompress.train.students import derive

FOLDER = Path(__file__).resolve().parents[2] / "models" / "segment_tabular"
TEACHER = FOLDER / "model.onnx"
with np.load(FOLDER / "evaluation.npz") as _arrays:
    X, Y = _arrays["features"], _arrays["labels"]
FIT, HELD = slice(0, 600), slice(600, None)
NAMES = np.array([f"kind {i}" for i in range(7)])


def student(spec="fresh"):
    """The network that made the model, as it was before it had learned anything."""
    return derive(oc.load(TEACHER), spec, {"features": X[FIT]}, seed=0).model


def learner(**options):
    return oc.Model(student(), **{"optimizer": AdamW(1e-2), "epochs": 8, **options})


def line(inputs=3, outputs=1):
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 17]>
    g (float[N,{inputs}] x) => (float[N,{outputs}] y) {{ y = Gemm<transB=1>(x, w, b) }}""")
    for name, shape in (("w", (outputs, inputs)), ("b", (outputs,))):
        array = np.zeros(shape, np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def values():
    x = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    return x, x @ np.array([1, -2, 0.5], np.float32) + 3


def regressor(**options):
    return oc.Model(line(), **{"optimizer": AdamW(0.1), "epochs": 20, **options})


@pytest.fixture(scope="module")
def trained():
    return learner().train(X[FIT], Y[FIT], evaluate=(X[HELD], Y[HELD]))


def test_it_learns_classes(trained):
    assert trained.score(X[HELD], Y[HELD]) > 0.8
    assert trained.predict(X[HELD]).dtype.kind == "i"
    assert trained.history.epochs
    assert trained.report.training == trained.history
    assert list(trained.classes_) == list(range(7))


def test_probabilities_are_shares_of_the_classes(trained):
    shares = trained.predict_proba(X[HELD])
    assert shares.shape == (300, 7)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    assert (shares >= 0).all()
    assert (trained.classes_[shares.argmax(1)] == trained.predict(X[HELD])).all()


def test_saved_and_loaded_is_equal_to_the_bit(trained, tmp_path):
    path = trained.save(tmp_path / "small.onnx")
    again = oc.Model.load(path)
    np.testing.assert_array_equal(again.outputs(X), trained.outputs(X))
    np.testing.assert_array_equal(again.predict(X), trained.predict(X))
    np.testing.assert_array_equal(again.predict_proba(X), trained.predict_proba(X))
    assert again.history == trained.history
    assert again.epochs == 8
    copy = pickle.loads(pickle.dumps(again))
    np.testing.assert_array_equal(copy.outputs(X), trained.outputs(X))


def test_a_loaded_model_trains_on(trained, tmp_path):
    again = oc.Model.load(trained.save(tmp_path / "small.onnx")).set_params(epochs=1)
    again.train(X[FIT], Y[FIT])
    assert again.score(X[HELD], Y[HELD]) > 0.7


SETTINGS = {
    "loss": [CrossEntropy("logits", smoothing=0.1)],
    "optimizer": AdamW(3e-3, betas=(0.8, 0.99)),
    "schedule": warm_up(0.2, then=stepped(2)),
    "augment": (Noise(0.01), Compose((Swap(0.05),)), Mixup(classes=7)),
    "clean": Cleaner(outliers=Detector("OneClassSVM", options={"nu": 0.1})),
    "recipe": Recipe.from_text('[[passes]]\nname = "prune_magnitude"\nsparsity = 0.1\n'),
    "classes": tuple(range(7)),
    "epochs": 2,
}


def test_what_was_saved_trains_on_as_it_did(tmp_path):
    model = oc.Model(student(), **SETTINGS)
    again = oc.Model.load(model.save(tmp_path / "m.onnx"))
    kept = {name: v for name, v in again.get_params().items() if name in SETTINGS}
    assert kept == SETTINGS | {"loss": tuple(SETTINGS["loss"])}
    assert pickle.loads(pickle.dumps(again)).schedule == SETTINGS["schedule"]
    for learning in (model, again):
        learning.set_params(recipe=None).train(X[:100], Y[:100])
    np.testing.assert_array_equal(again.outputs(X), model.outputs(X))


def test_code_of_ones_own_is_not_kept_and_that_is_said(tmp_path):
    model = oc.Model(TEACHER, epochs=3, augment=[lambda batch, rng: dict(batch)], schedule=linear)
    with pytest.warns(UserWarning, match=r"does not keep augment, which is code of your own"):
        path = model.save(tmp_path / "m.onnx")
    again = oc.Model.load(path)
    assert (again.augment, again.schedule, again.epochs) == ((), linear, 3)


@pytest.mark.parametrize("setting", [
    {"os.system": {"command": "true"}},
    {"AdamW": {"lr": "much"}},
    {"AdamW": {"lr": -1.0}},
    {"AdamW": {"rate": 1.0}},
    {"AdamW": 3},
    {"AdamW": {}, "SGD": {}},
    {"recipe": "[passes"},
])  # fmt: skip
def test_settings_that_nobody_wrote_are_refused(tmp_path, setting):
    kept = {"settings": {"optimizer": setting}, "history": None, "task": None}
    graph = oc.load(TEACHER)
    graph.metadata_props["onnxcompress.model"] = json.dumps(kept)
    with pytest.raises(InputError, match="save it again"):
        oc.Model.load(oc.save(graph, tmp_path / "m.onnx").model)


def test_classes_of_any_name_come_back(tmp_path):
    model = learner(epochs=3).train(X[FIT], NAMES[Y[FIT]])
    assert set(model.predict(X[HELD])) <= set(NAMES)
    assert model.score(X[HELD], NAMES[Y[HELD]]) > 0.5
    again = oc.Model.load(model.save(tmp_path / "m.onnx"))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_values_are_learned_and_keep_their_shape(tmp_path):
    x, y = values()
    for loss in (None, MeanSquared("y", "target")):
        model = regressor(loss=loss).train(x, y)
        bias = model.model.graph.initializers["b"].const_value
        assert bias is not None and bias.numpy() > 2
        assert model.predict(x).shape == y.shape
        assert model.score(x, y) > 0.95
    again = oc.Model.load(model.save(tmp_path / "m.onnx"))
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    with pytest.raises(InputError, match="not trained on"):
        model.predict_proba(x)


@pytest.mark.parametrize("taught", [False, True])
def test_equal_biases_at_the_start_part(taught):
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 17]>
    g (float[N,3] x) => (float[N,4] y) {
      a = Gemm(x, w1, b1)
      h = Relu(a)
      y = Gemm(h, w2, b2)
    }""")
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (3, 4), "b1": (4,), "w2": (4, 4), "b2": (4,)}.items():
        array = rng.standard_normal(shape) if len(shape) > 1 else np.zeros(shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    start = ir.from_proto(proto)
    x, y = values()
    model = oc.Model(start, start if taught else None, epochs=1)
    model.train(x, (y > 3).astype(int) + 2 * (x[:, 0] > 0))
    assert set(model.model.graph.initializers) == {"w1", "b1", "w2", "b2"}


def test_a_teacher_and_integers_at_the_end():
    model = oc.Model("narrow:0.5", TEACHER, quantize="static", epochs=2, classes=list(NAMES))
    model.train(X[FIT], evaluate=(X[HELD], NAMES[Y[HELD]]))
    assert model.score(X[HELD], NAMES[Y[HELD]]) > 0.8
    assert model.report is not None and model.report.validation is not None
    assert model.report.training == model.history
    assert any(node.op_type == "QuantizeLinear" for node in model.model.graph)
    assert model.classes_ is not None and list(model.classes_) == list(NAMES)


def test_a_teacher_with_labels_of_some():
    some = np.where(np.arange(600) % 2, -1, Y[FIT])
    model = oc.Model(student("narrow:0.5"), TEACHER, epochs=2).train(X[FIT], some)
    assert model.score(X[HELD], Y[HELD]) > 0.8


def test_a_recipe_follows_and_its_gates_hold(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[[passes]]\nname = "prune_magnitude"\nsparsity = 0.3\n', encoding="utf-8")
    model = oc.Model(TEACHER, recipe=path, epochs=0).train(X[FIT], Y[FIT])
    assert model.report is not None and model.report.passes
    path.write_text("[train]\nepochs = 3\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"\[train\]"):
        oc.Model(TEACHER, recipe=path).train(X[FIT], Y[FIT])
    strict = Recipe.from_toml(_strict(path))
    model = oc.Model(TEACHER, recipe=strict, epochs=0)
    with pytest.raises(GateError):
        model.train(X[FIT], Y[FIT])
    assert model.score(X[HELD], Y[HELD]) > 0.9, "the floats stay"


def _strict(path):
    path.write_text(
        '[gates]\nsqnr = ">= 90"\n[[passes]]\nname = "prune_magnitude"\nsparsity = 0.9\n',
        encoding="utf-8",
    )
    return path


def test_cleaning_drops_what_is_not_finite():
    spoiled = X[FIT].copy()
    spoiled[5, 3] = np.nan
    model = learner(epochs=1, clean=True).train(spoiled, Y[FIT])
    assert model.report is not None and model.report.notes


def test_parameters_are_scikit_learns():
    model = learner()
    assert model.get_params()["epochs"] == 8
    assert model.set_params(epochs=2, seed=3) is model
    assert (model.epochs, model.seed) == (2, 3)
    with pytest.raises(InputError, match="epochs"):
        model.set_params(epoch=2)
    assert "epochs=2" in repr(model)


def test_it_stands_in_scikit_learns_pipeline():
    base = pytest.importorskip("sklearn.base")
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    model = learner()
    copy = base.clone(model)
    assert copy is not model
    assert copy.get_params() == model.get_params()
    assert base.is_classifier(model)
    assert base.is_regressor(regressor())
    chain = pipeline.Pipeline([("scale", preprocessing.StandardScaler()), ("model", copy)])
    chain.fit(X[FIT], Y[FIT])
    assert chain.score(X[HELD], Y[HELD]) > 0.6


def test_it_stands_in_a_search_over_a_grid():
    search = pytest.importorskip("sklearn.model_selection")
    grid = {"optimizer": [AdamW(1e-5), AdamW(1e-2)], "schedule": [None, warm_up(0.1)]}
    found = search.GridSearchCV(learner(epochs=2), grid, cv=2, error_score="raise")
    found.fit(X[:300], Y[:300])
    assert found.best_params_["optimizer"] == AdamW(1e-2)
    assert found.best_estimator_.score(X[HELD], Y[HELD]) > 0.4


def network(width):
    """Ten inputs, one hidden layer, one value."""
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 17]>
    g (float[N,10] x) => (float[N,1] y) {
      a = Gemm<transB=1>(x, w1, b1)
      h = Relu(a)
      y = Gemm<transB=1>(h, w2, b2)
    }""")
    draw = np.random.default_rng(0).standard_normal
    shapes = {"w1": (width, 10), "b1": (width,), "w2": (1, width), "b2": (1,)}
    for name, shape in shapes.items():
        array = (draw(shape) / np.sqrt(shape[-1])).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def test_values_of_real_data_are_learned_from_a_teacher_alone():
    """Diabetes (Efron et al., Least angle regression, 2004), which linear models reach 0.5 on."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_diabetes(return_X_y=True)
    x, y = (20 * x).astype(np.float32), ((y - y.mean()) / y.std()).astype(np.float32)
    learned, held, few = slice(0, 342), slice(342, None), slice(0, 40)
    options = {"optimizer": AdamW(1e-2, weight_decay=0.1), "epochs": 20}
    teacher = oc.Model(network(32), **options).train(x[learned], y[learned])
    alone = oc.Model(network(8), **options).train(x[few], y[few])
    taught = oc.Model(network(8), teacher.model, **options).train(x[learned])
    scores = [model.score(x[held], y[held]) for model in (teacher, alone, taught)]
    assert scores[0] > 0.35
    assert scores[2] > max(scores[1] + 0.05, scores[0] - 0.1), scores


def test_unfitted_it_predicts_as_the_student_does():
    model = oc.Model(TEACHER)
    assert model.predict(X).shape == (900, 7)
    assert (model.predict(X).argmax(1) == Y).mean() > 0.9
    named = oc.Model(TEACHER, classes=list(NAMES))
    assert named.score(X, NAMES[Y]) > 0.9
    with pytest.raises(InputError, match="not trained on"):
        model.predict_proba(X)
    with pytest.raises(InputError, match="train first"):
        oc.Model("narrow:0.5", TEACHER).predict(X)


WITH_NAN = np.where(np.arange(18) == 4, np.nan, X[:20])


@pytest.mark.parametrize(
    ("options", "x", "y", "says"),
    [
        ({}, X[:20, :5], Y[:20], "X"),
        ({}, X[:0], Y[:0], "no samples|empty"),
        ({}, WITH_NAN, Y[:20], "NaN"),
        ({}, X[:20], Y[:19], "20 samples but Y has 19"),
        ({}, X[:20], None, "nothing to learn from"),
        ({}, X[:20], NAMES[Y[:20] % 2], "2 classes but the model gives 7"),
        ({}, np.array([["a"] * 18] * 20), Y[:20], "X"),
        ({"loss": "cross entropy"}, X[:20], Y[:20], "loss"),
        ({"loss": [CrossEntropy("nowhere")]}, X[:20], Y[:20], "nowhere"),
        ({"quantize": "statik"}, X[:20], Y[:20], "static"),
        ({"epochs": -1}, X[:20], Y[:20], "epochs"),
        ({"recipe": Recipe(()), "quantize": "static"}, X[:20], Y[:20], "one of them"),
    ],
)
def test_what_does_not_suit_is_said_in_a_sentence(options, x, y, says):
    with pytest.raises(InputError, match=says) as error:
        learner(**options).train(x, y)
    assert "\n" not in str(error.value)


def test_predicting_refuses_what_does_not_suit(trained):
    for wrong in (X[:5, :4], X[:0], WITH_NAN):
        with pytest.raises(InputError) as error:
            trained.predict(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="Y is"):
        trained.score(X, Y[:3])


def test_values_that_are_no_numbers_are_refused():
    x, y = values()
    for wrong in (np.full(len(y), "a"), np.full(len(y), np.nan)):
        with pytest.raises(InputError, match="Y holds"):
            regressor().train(x, wrong)


def test_damaged_files_are_refused(trained, tmp_path):
    path = trained.save(tmp_path / "m.onnx")
    whole = path.read_bytes()
    (tmp_path / "short.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.onnx").write_bytes(whole.replace(b'"settings": {', b'"settings": ['))
    for name in ("short", "other", "missing"):
        with pytest.raises(InputError) as error:
            oc.Model.load(tmp_path / f"{name}.onnx")
        assert "\n" not in str(error.value)


def test_any_file_is_an_untrained_model():
    assert oc.Model.load(TEACHER).history is None
