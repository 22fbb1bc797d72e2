"""A folder of images as feeds: decoded one at a time, turned into the model's input as told."""

from __future__ import annotations

import csv
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from onnxcompress import options
from onnxcompress.contract import Array
from onnxcompress.data.ports import Port
from onnxcompress.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)
_MAX_PIXELS = 1 << 27


@dataclass(frozen=True, kw_only=True)
class Images:
    """How an image becomes the model's input: (pixel·scale - mean) / std, pixels from 0 to 255.

    Attributes:
        size: (height, width); where the model fixes it, it need not be told.
        layout: likewise.
        scale: 1/255 where it is not told. A model that takes integers gets the pixels as they are.
        mean, std: one number, or one a channel in the order of `channels`.
        channels: their order; `GRAY` is one channel.
        resize: `crop` the middle after the shorter side was made size/crop; `stretch` to the size;
            `pad` with `fill` around the image, its proportions kept.
        crop: what share of the resized image's shorter side is kept (224 of 256 is 0.875).
        labels: a CSV file of `image,label` lines; without it sub-folders, sorted, are the classes
            (their names where all are numbers).
    """

    size: tuple[int, int] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None
    scale: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Literal["RGB", "BGR", "GRAY"] = "RGB"
    resize: Literal["crop", "stretch", "pad"] = "crop"
    crop: float = 0.875
    fill: int = 0
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    labels: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise InputError(f"crop must be over 0 and at most 1, not {self.crop}")
        if not 0 <= self.fill <= 255:
            raise InputError(f"fill must be from 0 to 255, not {self.fill}")
        if self.size is not None and min(self.size) < 1:
            raise InputError(f"size must be positive, not {self.size}")
        if 0 in self.std:
            raise InputError("std must not be 0")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.depth):
                raise InputError(f"{name} must have 1 or {self.depth} numbers for {self.channels}")

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]`: TOML's inline tables.

        Raises:
            InputError: if it is not that, or an option is unknown or wrong.
        """
        try:
            table = tomllib.loads(f"images = {{{text}}}")["images"]
        except tomllib.TOMLDecodeError as error:
            raise InputError(
                f"image options {text!r}: write them as 'size=[224, 224], mean=[0.5]': {error}"
            ) from error
        return options.build(cls, table, "image options")

    @property
    def depth(self) -> int:
        """Number of channels."""
        return 1 if self.channels == "GRAY" else 3


def photos(folder: Path, port: Port, how: Images) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """The images below `folder` as feeds that are not decoded yet, with labels if they have some.

    The second result is how many at the end do not fill the model's fixed batch.

    Raises:
        InputError: if the options and the model disagree, or labels are missing.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    labels = _labels(folder, paths, how.labels)
    preprocess = Preprocess.of(port, how)
    rows = preprocess.shape[0]
    feeds: list[tuple[str, dict[str, Any]]] = []
    for start in range(0, len(paths) - rows + 1, rows):
        group = tuple(paths[start : start + rows])
        feed: dict[str, Any] = {port.name: Photos(group, preprocess)}
        if labels:
            feed["labels"] = np.array([labels[p] for p in group])
        feeds.append((str(group[0]), feed))
    return feeds, len(paths) % rows


def _labels(folder: Path, paths: list[Path], file: str | None) -> dict[Path, int]:
    if file is not None:
        return _labels_of_file(folder, paths, Path(file))
    classes = sorted({p.relative_to(folder).parts[0] for p in paths if p.parent != folder})
    if not classes or any(p.parent == folder for p in paths):
        return {}
    number = {name: i for i, name in enumerate(classes)}
    if all(name.isdecimal() for name in classes):
        number = {name: int(name) for name in classes}
    return {p: number[p.relative_to(folder).parts[0]] for p in paths}


def _labels_of_file(folder: Path, paths: list[Path], file: Path) -> dict[Path, int]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = {folder / row[0]: int(row[1]) for row in csv.reader(lines) if row}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise InputError(f"{file}: write lines 'image,number' as labels: {error}") from error
    for path in paths:
        if path not in rows:
            raise InputError(f"{file} has no label for {path.relative_to(folder)}: add its line")
    return {path: rows[path] for path in paths}


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Image options with everything settled for one input of a model."""

    how: Images
    dtype: np.dtype[Any]
    rows: int
    height: int
    width: int
    layout: Literal["NCHW", "NHWC"]

    @classmethod
    def of(cls, port: Port, how: Images) -> Preprocess:
        if port.shape is None or len(port.shape) != 4:
            raise InputError(f"images need an input of 4 axes, {port.name!r} is {port.describe()}")
        if port.dtype.kind != "f" and (how.scale, how.mean, how.std) != (None, (0.0,), (1.0,)):
            raise InputError(
                f"input {port.name!r} takes pixels as {port.dtype}: leave out scale, mean and std"
            )
        layout = how.layout or _layout(port.shape, how.depth)
        if layout is None:
            raise InputError(f"input {port.name!r} is {port.describe()}: tell the images' layout")
        fixed = port.shape[2:4] if layout == "NCHW" else port.shape[1:3]
        height, width = how.size or fixed
        if not isinstance(height, int) or not isinstance(width, int):
            raise InputError(f"input {port.name!r} is {port.describe()}: tell the images' size")
        rows = port.shape[0] if isinstance(port.shape[0], int) else 1
        dtype = np.dtype(np.float32 if port.dtype.kind == "f" else np.uint8)
        made = cls(how, dtype, rows, height, width, layout)
        if not port.accepts(made.shape):
            raise InputError(
                f"images of shape {list(made.shape[1:])} do not fit input {port.name!r}, "
                f"{port.describe()}: change size, layout or channels"
            )
        return made

    @property
    def shape(self) -> tuple[int, int, int, int]:
        depth = self.how.depth
        if self.layout == "NCHW":
            return (self.rows, depth, self.height, self.width)
        return (self.rows, self.height, self.width, depth)

    def __call__(self, image: Image.Image) -> Array:
        """(1, ...) in the model's layout, float32 or uint8."""
        pixels = np.asarray(_resized(image, self.height, self.width, self.how))
        pixels = pixels.reshape(self.height, self.width, self.how.depth)
        if self.how.channels == "BGR":
            pixels = pixels[..., ::-1]
        if self.dtype.kind == "f":
            scale = np.float32(1 / 255 if self.how.scale is None else self.how.scale)
            mean, std = (np.asarray(v, np.float32) for v in (self.how.mean, self.how.std))
            pixels = (pixels.astype(np.float32) * scale - mean) / std
        if self.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[np.newaxis])


@dataclass(frozen=True, slots=True)
class Photos:
    """The images of one feed as an array that is decoded when it is read."""

    paths: tuple[Path, ...]
    preprocess: Preprocess

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.preprocess.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.preprocess.shape

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> Array:
        rows = [self.preprocess(self._decode(path)) for path in self.paths]
        return np.asarray(rows[0] if len(rows) == 1 else np.concatenate(rows), dtype=dtype)

    def _decode(self, path: Path) -> Image.Image:
        try:
            from PIL import Image
        except ImportError as error:
            raise InputError("images need pillow: pip install 'onnxcompress[images]'") from error
        try:
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise InputError(f"{path} is over 134 million pixels: make it smaller")
                return image.convert("L" if self.preprocess.how.channels == "GRAY" else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be decoded, remove it: {error}") from error


def _layout(shape: tuple[int | str | None, ...], depth: int) -> Literal["NCHW", "NHWC"] | None:
    first, last = shape[1] == depth, shape[3] == depth
    if first == last:
        return None
    return "NCHW" if first else "NHWC"


def _resized(image: Image.Image, height: int, width: int, how: Images) -> Image.Image:
    from PIL import Image, ImageOps

    filters = {
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "nearest": Image.Resampling.NEAREST,
    }
    method = filters[how.interpolation]
    if how.resize == "stretch":
        return image.resize((width, height), method)
    if how.resize == "pad":
        fill = (how.fill,) * how.depth if how.depth > 1 else how.fill
        return ImageOps.pad(image, (width, height), method, fill)
    ratio = max(height / image.height, width / image.width) / how.crop
    size = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.resize(size, method).crop((left, top, left + width, top + height))
