"""A model to train, compress and predict with in a few lines, the way scikit-learn's are used.

    Model(student, teacher).train(X, Y).save("small.onnx")

It follows scikit-learn's protocol without importing it: the constructor stores its arguments
under their names, `train` (or `fit`) checks them, and what was learned stands in other attributes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from onnxcompress import model_io
from onnxcompress.api import Quantization, as_model
from onnxcompress.contract import Array
from onnxcompress.data import interface
from onnxcompress.errors import GateError, InputError, did_you_mean
from onnxcompress.recipe import Recipe
from onnxcompress.report import Report
from onnxcompress.session import Session
from onnxcompress.train import loop
from onnxcompress.train.augment import Augmentation
from onnxcompress.train.batch_statistics import by_batch
from onnxcompress.train.clean import Cleaner
from onnxcompress.train.compression import compress_trained
from onnxcompress.train.distill import distill
from onnxcompress.train.exact import to_train, when_trained
from onnxcompress.train.history import History
from onnxcompress.train.kept import KEY, Kept, take_kept
from onnxcompress.train.losses import Loss, learns_classes
from onnxcompress.train.optimizers import Optimizer
from onnxcompress.train.predict import outputs_of
from onnxcompress.train.samples import LABELS, Samples
from onnxcompress.train.schedules import Schedule
from onnxcompress.train.settings import Tuning
from onnxcompress.train.students import derive, is_spec
from onnxcompress.train.task import (
    Task,
    as_task,
    default_losses,
    gives_scores,
    read,
    read_both,
    unlearned,
)


class Model:
    """An ONNX model that learns from arrays, and is quantized when it has.

    Before training it predicts as the student does as it is.

    Args:
        student: the model to train: a path, one in memory (not altered), or how to derive it from
            the teacher, such as "narrow:0.5" (`students.derive`).
        teacher: a path or a model whose answers are learned from, beside or in place of labels.
        recipe: passes to apply after training, whose gates the result must hold: a `Recipe` or the
            path of one, without a table [train].
        loss: one or several; by default `CrossEntropy` for classes, `MeanSquared` for values, and
            those of `distill` with a teacher. They may read `labels` (classes), `target` (values)
            and `teacher.NAME`.
        optimizer: AdamW by default.
        schedule: of the learning rate; half a cosine by default.
        epochs: 0 leaves the weights as they are: with `quantize`, that alone is done.
        augment: steps on batches, see `augment`.
        clean: True or a `Cleaner` drops samples that are not finite or far out.
        quantize: how, after training; "static" is calibrated on X, with compensation.
        tune_epochs: times through X that what `quantize` or the recipe made is then tuned by what
            the teacher (or the trained floats) say; see `tune`. A recipe's table [tune] has more.
        classes: what the scores stand for, in order, where the labels are no numbers of them.
        trainable: patterns of the weights to train; see `parameters.trainable_weights`.
        temperature, label_weight: of distillation; see `distill`.
        batch_statistics: train batch normalizations with the statistics of batches; by default
            those that were never trained. See `loop.train`.
        patience: epochs without a better one on the data to evaluate after which training stops.
        threads: 0 leaves the choice to ONNX Runtime.

    Attributes:
        history: the epochs of training; None before.
        report: what came of training and compression, with the comparison to the trained floats
            where there was one, as data (`onnxcompress.report`); None before.
        classes_: array of the classes in the order of the scores; None where values are learned.
    """

    def __init__(
        self,
        student: ir.Model | str | Path,
        teacher: ir.Model | str | Path | None = None,
        recipe: Recipe | str | Path | None = None,
        *,
        loss: Loss | Sequence[Loss] | None = None,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        epochs: int = 10,
        batch_size: int = 32,
        augment: Sequence[Augmentation] = (),
        clean: Cleaner | bool | None = None,
        quantize: Quantization | None = None,
        tune_epochs: int = 0,
        classes: Sequence[Any] | None = None,
        trainable: Sequence[str] = ("*",),
        temperature: float = 2.0,
        label_weight: float = 1.0,
        batch_statistics: bool | None = None,
        patience: int | None = None,
        seed: int = 0,
        threads: int = 0,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.recipe = recipe
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        self.epochs = epochs
        self.batch_size = batch_size
        self.augment = augment
        self.clean = clean
        self.quantize = quantize
        self.tune_epochs = tune_epochs
        self.classes = classes
        self.trainable = trainable
        self.temperature = temperature
        self.label_weight = label_weight
        self.batch_statistics = batch_statistics
        self.patience = patience
        self.seed = seed
        self.threads = threads
        self.history: History | None = None
        self.report: Report | None = None
        self._model: ir.Model | None = None
        self._task: Task | None = None
        self._session: Session | None = None

    def train(
        self,
        X: Any,
        Y: Any = None,
        *,
        evaluate: Any = None,
        unlabelled: Any = None,
        checkpoint: str | Path | None = None,
        progress: loop.Progress | None = None,
    ) -> Self:
        """Train the student, then compress it as configured.

        Args:
            X: an array, for a model of one input; arrays by input name; or what `open_data` opens.
            Y: classes or values of the samples; `labels` of X when None. With a teacher they may
                lack; whole numbers below zero are samples without a label.
            evaluate: (X, Y), or X with `labels`, to choose the best epoch by and to compare what
                was compressed on, in place of X.
            unlabelled: more X for the teacher to be asked about.
            checkpoint: a file that training goes on from if it is there; see `loop.train`.
            progress: called after each step.

        Raises:
            InputError: if models, data or settings do not suit each other.
            GateError: if what compression made misses a gate; the trained floats stay.
        """
        self._check()
        recipe = _as_recipe(self.recipe)
        if recipe is not None and recipe.training is not None:
            raise InputError("the recipe has a table [train], but a Model is told how to train by "
                             "its arguments: move it there")  # fmt: skip
        teacher = None if self.teacher is None else as_model(self.teacher)
        student = self._student(teacher, X)
        student = to_train(student, by_batch=by_batch(student, self.batch_statistics))
        inputs, answers, notes = self._samples(student, teacher, X, Y)
        task, columns = None, dict[str, Array]()
        losses = _losses(self.loss)
        if answers is not None:
            task, columns = as_task(student, answers, losses, self.classes)
        classes = self.classes if task is None else task.classes
        held = None if evaluate is None else self._held(student, teacher, evaluate, classes)
        data = {**inputs, **columns}
        if self.epochs:
            student, history = self._learn(
                student,
                teacher,
                data,
                task,
                evaluate=held,
                unlabelled=unlabelled,
                checkpoint=None if checkpoint is None else Path(checkpoint),
                progress=progress,
            )
        else:
            history = History()
        student = when_trained(student)
        if task is None and self.classes is not None:
            task = unlearned(student, self.classes)
        self._model, self._task, self._session = student, task, None
        self.history = history
        compressed = compress_trained(
            student,
            recipe,
            cast("Quantization | None", self.quantize),
            inputs,
            held or data,
            tuning=self._tuning(recipe),
            teacher=teacher,
        )
        self.report = replace(
            compressed.report, training=history, notes=(*notes, *compressed.report.notes)
        )
        if compressed.refusal:
            raise GateError(f"what compression made is not kept, the trained floats stay: "
                            f"{compressed.refusal}", self.report)  # fmt: skip
        self._model = compressed.model
        return self

    def fit(self, X: Any, y: Any = None, **options: Any) -> Self:
        """`train`, by scikit-learn's name."""
        return self.train(X, y, **options)

    def predict(self, X: Any) -> Array:
        """Classes (n,) where some were learned, else the output of each sample."""
        task = self._read_as()
        return task.labels(self._outputs(X)[task.output])

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes: float32 (n, classes).

        Raises:
            InputError: if no classes were learned.
        """
        task = self._read_as()
        if task.classes is None:
            raise InputError("probabilities are of classes, which this model was not trained on")
        return task.probabilities(self._outputs(X)[task.output])

    def outputs(self, X: Any) -> Any:
        """What the model gives of each sample: an array, or arrays by name of several outputs.

        Raises:
            InputError: if X does not suit the model.
        """
        found = self._outputs(X)
        return next(iter(found.values())) if len(found) == 1 else found

    def score(self, X: Any, Y: Any) -> float:
        """Accuracy, or R² (1 - squared error over variance, at most 1) of values.

        Raises:
            InputError: if X and Y differ in their samples.
        """
        found = self.predict(X)
        wanted: Array = np.asarray(Y)
        if found.shape == (*wanted.shape, 1):
            found = found[..., 0]
        if found.shape != wanted.shape:
            raise InputError(f"predictions are {list(found.shape)} but Y is {list(wanted.shape)}")
        if self._read_as().classes is not None:
            return float((found == wanted).mean())
        spread = float(np.square(wanted - wanted.mean(0)).sum())
        missed = float(np.square(wanted - found).sum())
        return 1 - missed / spread if spread else float(missed == 0)

    @property
    def model(self) -> ir.Model:
        """The graph that predicts: as trained, or the student as it is."""
        return self._model if self._model is not None else self._student(None, None)

    @property
    def classes_(self) -> Array | None:
        return self._task.classes if self._task else None

    def save(self, path: str | Path) -> Path:
        """Write an `.onnx` that any runtime takes, whole or not at all.

        Its metadata keep the history, the classes, and the settings but student and teacher, as
        data, for `load`. Callables and classes of your own are not kept, of which a warning tells.

        Raises:
            InputError: if it cannot be written there, or the recipe is a file that is gone.
        """
        settings = {name: getattr(self, name) for name in _kept_names()}
        settings["recipe"] = _as_recipe(self.recipe)
        kept = Kept(settings, self.history, self._task)
        if kept.left_out:
            names = ", ".join(kept.left_out)
            warnings.warn(f"{path} does not keep {names}, which is code of your own: set it again "
                          "when the model is loaded (set_params)", stacklevel=2)  # fmt: skip
        return model_io.save(kept.within(self.model), path).model

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A model that `save` wrote, or any other `.onnx`, which is then an untrained student.

        One that was saved trains on as it did: from the weights that the file holds.

        Raises:
            InputError: if it cannot be read.
        """
        model = model_io.load(path)
        kept = take_kept(model, str(path), _kept_names())
        if kept is None:
            return cls(path)
        found = cls(path, **kept.settings)
        found.history, found._task, found._model = kept.history, kept.task, model
        return found

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name; `deep` is scikit-learn's and changes nothing."""
        return {name: getattr(self, name) for name in _names()}

    def set_params(self, **params: Any) -> Self:
        """Change arguments of the constructor, for the next training.

        Raises:
            InputError: if there is none of a name.
        """
        for name in params:
            if name not in _names():
                raise InputError(f"Model has no parameter {name!r}{did_you_mean(name, _names())}")
        vars(self).update(params)
        return self

    def _check(self) -> None:
        bounds = ("epochs", 0), ("tune_epochs", 0), ("batch_size", 1), ("seed", 0), ("threads", 0)
        for name, least in bounds:
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} is {value!r} but must be a whole number from {least} on")
        if self.quantize is not None and self.quantize not in (known := get_args(Quantization)):
            hint = did_you_mean(str(self.quantize), known)
            raise InputError(f"quantize is {self.quantize!r}, which is no scheme{hint}")
        for loss in _losses(self.loss) or ():
            if not hasattr(loss, "emit"):
                raise InputError(f"loss holds {loss!r}, which is no loss: take CrossEntropy() or "
                                 "another of onnxcompress.train.losses")  # fmt: skip
        if self.tune_epochs and self.quantize is None and self.recipe is None:
            raise InputError("tune_epochs tune what was quantized: give quantize or a recipe too")
        if self.quantize is not None and self.recipe is not None:
            raise InputError(
                "a recipe says how to compress, and so does quantize: give one of them"
            )

    def _tuning(self, recipe: Recipe | None) -> Tuning | None:
        if recipe is not None and recipe.tuning is not None:
            return recipe.tuning
        names = ("batch_size", "temperature", "seed")
        settings = {name: getattr(self, name) for name in names}
        return Tuning(epochs=self.tune_epochs, **settings) if self.tune_epochs else None

    def _student(self, teacher: ir.Model | None, data: Any) -> ir.Model:
        """A student of our own, as it is before training."""
        if isinstance(self.student, ir.Model):
            return self.student.clone()
        if not isinstance(self.student, str) or not is_spec(self.student):
            model = model_io.load(self.student)
            model.metadata_props.pop(KEY, None)
            return model
        if teacher is None:
            raise InputError(f"the student {self.student!r} is made from a teacher when it is "
                             "trained: give the teacher, and train first")  # fmt: skip
        ports = interface(teacher)
        return derive(teacher, self.student, read(data, ports, "X"), seed=self.seed).model

    def _samples(
        self, student: ir.Model, teacher: ir.Model | None, X: Any, Y: Any
    ) -> tuple[dict[str, Array], Any, tuple[str, ...]]:
        """Inputs and answers without what cleaning drops, and its notes."""
        inputs, own = read_both(X, student, teacher, "X", finite=not self.clean)
        answers, notes = own if Y is None else np.asarray(Y), ()
        size = Samples(inputs, "X").size
        if answers is not None and len(np.atleast_1d(answers)) != size:
            raise InputError(f"X has {size} samples but Y has {len(np.atleast_1d(answers))}")
        if self.clean:
            cleaner = Cleaner() if self.clean is True else self.clean
            inputs, cleaning = cleaner.arrays(inputs)
            answers, notes = None if answers is None else answers[cleaning.kept], cleaning.notes
        return inputs, answers, notes

    def _held(
        self, student: ir.Model, teacher: ir.Model | None, source: Any, classes: Any
    ) -> dict[str, Array]:
        """The arrays to evaluate on."""
        X, Y = cast("tuple[Any, Any]", source) if isinstance(source, tuple) else (source, None)
        inputs, own = read_both(X, student, teacher, "evaluate")
        answers = own if Y is None else Y
        if answers is None:
            return inputs
        return inputs | as_task(student, answers, _losses(self.loss), classes)[1]

    def _learn(
        self,
        student: ir.Model,
        teacher: ir.Model | None,
        data: dict[str, Array],
        task: Task | None,
        *,
        evaluate: dict[str, Array] | None,
        unlabelled: Any,
        **options: Any,
    ) -> tuple[ir.Model, History]:
        names = ("optimizer", "epochs", "batch_size", "augment", "trainable", "batch_statistics",
                 "patience", "seed", "threads")  # fmt: skip
        options |= {name: getattr(self, name) for name in names} | {"evaluate": evaluate}
        if self.schedule is not None:
            options["schedule"] = self.schedule
        losses = _losses(self.loss)
        if teacher is not None:
            more = None
            if unlabelled is not None:
                more = read_both(unlabelled, student, teacher, "unlabelled")[0]
            weights = {"temperature": self.temperature, "label_weight": self.label_weight}
            told = distill(
                teacher, student, data, unlabelled=more, losses=losses, **weights, **options
            )
            return told.model, told.history
        if unlabelled is not None:
            raise InputError("samples without labels are learned from a teacher: give one")
        if losses is None and task is None:
            raise InputError("there is nothing to learn from: give Y, a teacher or a loss")
        if losses is None and task is not None:
            losses = default_losses(student, task)
        counted = evaluate is not None and LABELS in evaluate
        options["monitor"] = "accuracy" if counted else "loss"
        trained = loop.train(student, data, losses=losses or (), **options)
        return trained.model, trained.history

    def _read_as(self) -> Task:
        """How outputs are read; those of a model that learned no answers are values."""
        return self._task or unlearned(self.model, self.classes)

    def _outputs(self, X: Any) -> dict[str, Array]:
        """Outputs by name, the samples on their first axis."""
        model = self.model
        ports = interface(model)
        samples = Samples(read(X, ports, "X"), "X")
        self._session = self._session or Session(model, threads=self.threads)
        return outputs_of(self._session, ports, samples)

    def __sklearn_clone__(self) -> Self:
        return type(self)(**self.get_params())

    def __sklearn_is_fitted__(self) -> bool:
        return self._model is not None

    def __sklearn_tags__(self) -> Any:
        tags: Any = import_module("sklearn.utils")
        losses = _losses(self.loss)
        if losses is not None:
            sorts = learns_classes(losses)
        else:
            path = isinstance(self.student, str) and is_spec(self.student)
            model = self.teacher if path else self.student
            sorts = model is not None and gives_scores(as_model(model).clone())
        return tags.Tags(
            estimator_type="classifier" if sorts else "regressor",
            target_tags=tags.TargetTags(required=self.teacher is None),
            classifier_tags=tags.ClassifierTags() if sorts else None,
            regressor_tags=None if sorts else tags.RegressorTags(),
        )

    def __getstate__(self) -> dict[str, Any]:
        # Weights may lie in a mapped file, and sessions in another process are new ones.
        plain = {n: ir.to_proto(v) if isinstance(v, ir.Model) else v for n, v in vars(self).items()}
        return {**plain, "_session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            vars(self)[name] = ir.from_proto(value) if isinstance(value, ModelProto) else value

    def __repr__(self) -> str:
        defaults = inspect.signature(Model).parameters
        shown = [
            f"{name}={value!r}" if not isinstance(value, ir.Model) else f"{name}=<model>"
            for name, value in self.get_params().items()
            if repr(value) != repr(defaults[name].default)
        ]
        return f"Model({', '.join(shown)})"


def _kept_names() -> tuple[str, ...]:
    """Those that a file keeps."""
    return tuple(name for name in _names() if name not in ("student", "teacher"))


@cache
def _names() -> tuple[str, ...]:
    """The constructor's arguments."""
    return tuple(inspect.signature(Model).parameters)


def _as_recipe(recipe: Recipe | str | Path | None) -> Recipe | None:
    return Recipe.from_toml(recipe) if isinstance(recipe, str | Path) else recipe


def _losses(loss: Loss | Sequence[Loss] | None) -> tuple[Loss, ...] | None:
    if loss is None:
        return None
    return tuple(loss) if isinstance(loss, list | tuple) else (cast("Loss", loss),)
