"""Every kind of image a hospital may keep comes out as the right 8-bit RGB, or as a DataError."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from common.errors import DataError
from common.model.images import Preprocess, decode, view

pytestmark = pytest.mark.numbers

RAMP = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
DEEP = RAMP.astype(np.uint16) * 257
COLOURS = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 90)], axis=-1)
OPS = ("flip", "rotate", "crop", "brightness")


@pytest.fixture(autouse=True)
def _one_thread():
    """Such small tensors gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def grey(pixels):
    assert pixels.dtype == torch.uint8
    assert (pixels == pixels[:1]).all()
    return pixels[0].numpy()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "JPEG2000", "PPM", "GIF"])
def test_grey_and_colour_are_exact_in_lossless_formats(form):
    np.testing.assert_array_equal(grey(decode(saved(RAMP, form))), RAMP)
    if form != "GIF":
        rgb = decode(saved(COLOURS, form))
        np.testing.assert_array_equal(rgb.permute(1, 2, 0).numpy(), COLOURS)


@pytest.mark.parametrize(
    ("form", "order"), [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">"), ("JPEG2000", "<")]
)
def test_16_bit_grey_is_scaled_not_clipped(form, order):
    np.testing.assert_array_equal(grey(decode(saved(DEEP.astype(f"{order}u2"), form))), RAMP)


def test_16_bit_tiff_may_be_compressed_and_in_between_values_round():
    data = saved(DEEP + 100, "TIFF", compression="tiff_lzw")
    np.testing.assert_array_equal(grey(decode(data))[:, :255], RAMP[:, :255])


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, colour, lines):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_colour_keeps_its_range():
    values = DEEP.astype(">u2")
    lines = np.stack([values] * 3, axis=-1).reshape(8, -1)
    data = b"".join(b"\0" + line.tobytes() for line in lines)
    np.testing.assert_array_equal(grey(decode(png(256, 8, 16, 2, data))), RAMP)


@pytest.mark.parametrize("tag", [{258: 12}, {262: 0}], ids=["12 bit", "white is zero"])
def test_grey_tiff_that_pillow_misreads_is_refused(tag):
    data = saved(DEEP, "TIFF", tiffinfo=_tags({258: 16, 262: 1}))
    ((number, value),) = tag.items()
    at = data.index(struct.pack("<HHI", number, 3, 1)) + 8
    with pytest.raises(DataError, match="TIFF"):
        decode(data[:at] + struct.pack("<H", value) + data[at + 2 :])


def _tags(values):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in values.items():
        tags[number] = value
    return tags


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode):
    with pytest.raises(DataError, match="8 or 16 bit"):
        decode(saved(Image.new(mode, (9, 9), 7), "TIFF"))


def test_transparency_is_composited_on_black():
    alpha = np.full((8, 256, 1), 128, np.uint8)
    half = (RAMP * (128 / 255)).round()
    rgba = decode(saved(np.concatenate([RAMP[..., None]] * 3 + [alpha], axis=-1)))
    np.testing.assert_allclose(grey(rgba), half, atol=1)
    la = decode(saved(np.concatenate([RAMP[..., None], alpha], axis=-1)))
    np.testing.assert_allclose(grey(la), half, atol=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 10, 20, 30])
    palette.putdata([0, 1])
    seen = decode(saved(palette, transparency=bytes([0, 255])))
    assert seen[:, 0].T.tolist() == [[0, 0, 0], [10, 20, 30]]
    keyed = decode(saved(Image.fromarray(COLOURS), transparency=(0, 255, 90)))
    assert keyed[:, :, 0].max() == 0
    assert keyed[:, 0, 1].tolist() == [1, 254, 90]


def test_palette_one_bit_and_cmyk():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 10, 20, 30])
    palette.putdata([0, 1])
    assert decode(saved(palette))[:, 0].T.tolist() == [[200, 100, 50], [10, 20, 30]]
    bits = decode(saved(Image.fromarray(RAMP > 127)))
    np.testing.assert_array_equal(grey(bits), np.where(RAMP > 127, 255, 0))
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    for form in ("TIFF", "JPEG"):
        assert (
            decode(saved(red, form)).float().mean((1, 2)) - torch.tensor([255, 0, 0])
        ).abs().max() < 3


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied(form):
    stored = Image.fromarray(COLOURS)
    upright = decode(saved(stored, form, exif=SIDEWAYS))
    assert torch.equal(upright, decode(saved(stored, form)).rot90(-1, (1, 2)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_slivers_are_refused_before_decoding():
    for width, height in [(60_000, 60_000), (2**31 - 1, 1), (9_000, 9_000), (51, 1)]:
        with pytest.raises(DataError, match=r"pixels, more than|decompression bomb"):
            decode(png(width, height, 8, 0, b""))
    jpeg = saved(COLOURS, "JPEG")
    size = jpeg.index(struct.pack(">HH", 8, 256))
    with pytest.raises(DataError, match="pixels, more than"):
        decode(jpeg[:size] + struct.pack(">HH", 9000, 9000) + jpeg[size + 4 :], at_least=10)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG", "JPEG2000", "PPM"])
def test_truncated_and_damaged_files_are_data_errors_and_nothing_else(form):
    random = np.random.default_rng(0)
    whole = saved(random.integers(0, 256, (40, 40, 3), dtype=np.uint8), form)
    for cut in np.linspace(0, len(whole) * 0.8, 12).astype(int):
        for at_least in (None, 10):
            with pytest.raises(DataError, match=r"scan 3: expected a readable image, got"):
                decode(whole[:cut], "scan 3", at_least)
    for _ in range(100):
        bent = bytearray(whole)
        for place in random.integers(0, min(200, len(whole)), 8):
            bent[place] = random.integers(0, 256)
        try:
            pixels = decode(bytes(bent), at_least=10)
        except DataError:
            continue
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == 3


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 999])
def test_what_is_no_image_is_a_data_error(data):
    with pytest.raises(DataError, match="readable image"):
        decode(data)


def test_formats_not_on_the_list_are_not_even_tried():
    with pytest.raises(DataError, match=r"got bytes in none of JPEG, PNG, .*PPM$"):
        decode(saved(RAMP, "TGA"))


IMAGENET = Preprocess(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photo(height=300, width=450):
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 9, width), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(2 * x), torch.sin(y * y / 9)])
    return (127.5 + 127.5 * waves).to(torch.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocess_agrees_with_pillow(interpolation):
    preprocess = Preprocess(256, 224, (0, 0, 0), (1, 1, 1), interpolation)
    filters = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
    pillow = Image.fromarray(photo().permute(1, 2, 0).numpy())
    pillow = pillow.resize((384, 256), filters[interpolation]).crop((80, 16, 304, 240))
    ours = preprocess.pixels(photo()).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - np.asarray(pillow).astype(int)).max() <= 1


@pytest.mark.parametrize("shape", [(28, 28), (500, 20), (20, 500), (224, 224), (1, 1)])
def test_preprocess_makes_a_square_of_any_shape(shape):
    pixels = IMAGENET.pixels(photo(*shape))
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == torch.uint8


def drafted(data, at_least):
    """The same image decoded in full and at the least size, both as the same square."""
    small, full = decode(data, at_least=at_least), decode(data)
    pair = [IMAGENET.with_size(at_least // 2).pixels(image).float() for image in (small, full)]
    return small.shape[1:], (pair[0] - pair[1]).abs().mean() / 255


@pytest.mark.parametrize(
    ("size", "at_least", "comes_as"),
    [
        ((400, 600), 401, (400, 600)),
        ((400, 600), 201, (400, 600)),
        ((400, 600), 200, (200, 300)),
        ((399, 601), 100, (200, 301)),
        ((600, 400), 100, (150, 100)),
        ((600, 400), 50, (75, 50)),
        ((600, 400), 8, (75, 50)),
    ],
)
def test_a_jpeg_is_decoded_smaller_but_never_below_what_is_needed(size, at_least, comes_as):
    shape, difference = drafted(saved(noisy(*size), "JPEG"), at_least)
    assert shape == comes_as
    assert difference < 0.01


def noisy(height, width):
    """A photograph's smooth shapes, and a sensor's noise on them."""
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return (photo(height, width).permute(1, 2, 0).numpy() + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"exif": SIDEWAYS}, {"progressive": True}],
    ids=["plain", "turned", "progressive"],
)
def test_jpegs_of_any_kind_may_come_smaller(mode, options):
    data = saved(Image.fromarray(noisy(640, 512)).convert(mode), "JPEG", **options)
    shape, difference = drafted(data, 128)
    assert shape == ((128, 160) if "exif" in options else (160, 128))
    assert difference < 0.01


def test_read_is_decode_then_pixels_with_two_pixels_for_one():
    large = saved(noisy(1100, 1300), "JPEG")
    read = IMAGENET.read(large)
    assert torch.equal(read, IMAGENET.pixels(decode(large, at_least=512)))
    full = IMAGENET.pixels(decode(large))
    assert not torch.equal(read, full)
    assert (read.float() - full.float()).abs().mean() / 255 < 0.01
    for untouched in (saved(noisy(1023, 1300), "JPEG"), saved(noisy(1100, 1300), "PNG")):
        assert torch.equal(IMAGENET.read(untouched), IMAGENET.pixels(decode(untouched)))
    with pytest.raises(DataError, match="scan 3: expected a readable image"):
        IMAGENET.read(large[:-999], "scan 3")


def test_real_jpegs_decoded_smaller_stay_close(shared):
    files = sorted(shared.glob("data/skin_sites/*/images/*.jpg"))[::200]
    if not files:
        pytest.skip(f"no skin images in {shared}")
    for file in files:
        data = file.read_bytes()
        shape, difference = drafted(data, 112)
        assert shape == (112, 112)
        assert difference < 0.01, file.name
        assert torch.equal(IMAGENET.read(data), IMAGENET.pixels(decode(data)))


def test_the_version_is_part_of_what_names_the_pixels():
    """The store's key and the contract hash the `repr`."""
    assert "version=2" in repr(IMAGENET)
    assert "version=2" in repr(IMAGENET.with_size(96))


def test_with_size_keeps_all_of_a_square_image():
    assert IMAGENET.with_size(None) is IMAGENET
    square = IMAGENET.with_size(96)
    assert (square.resize, square.crop, square.mean) == (96, 96, IMAGENET.mean)
    image = photo(96, 96)
    assert torch.equal(square.pixels(image), image)


def test_normalise_is_by_channel():
    batch = torch.stack([IMAGENET.pixels(photo())] * 2)
    out = IMAGENET.normalise(batch)
    assert out.dtype == torch.float32
    expected = (batch[1, 2, 5, 7] / 255 - 0.406) / 0.225
    torch.testing.assert_close(out[1, 2, 5, 7], expected)


def test_views_are_seeded_and_keep_the_image():
    image = photo(64, 64)
    assert torch.equal(view(image, (), 1), image)
    assert torch.equal(view(image, OPS, 5), view(image, OPS, 5))
    seen = {view(image, OPS, seed).numpy().tobytes() for seed in range(20)}
    assert len(seen) == 20
    for op in OPS:
        views = [view(image, (op,), seed) for seed in range(12)]
        assert any(not torch.equal(one, image) for one in views), op
        assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in views)
        assert all(one.float().std() > 0.8 * image.float().std() for one in views), op


def test_flip_is_an_exact_mirror_half_of_the_time():
    image = photo(64, 64)
    same = [torch.equal(view(image, ("flip",), seed), image) for seed in range(100)]
    mirror = [torch.equal(view(image, ("flip",), seed), image.flip(-1)) for seed in range(100)]
    assert all(a != b for a, b in zip(same, mirror, strict=True))
    assert 30 < sum(mirror) < 70


def test_geometry_stays_within_its_bounds():
    """A dot's place before and after gives the angle and the scale of each view."""
    image = torch.zeros(3, 201, 201, dtype=torch.uint8)
    image[:, 98:103, 158:163] = 255  # 60 pixels right of the centre
    for seed in range(60):
        x, y = _dot(view(image, ("rotate",), seed))
        assert np.hypot(x, y) == pytest.approx(60, abs=0.6)
        assert abs(np.degrees(np.arctan2(y, x))) < 15.5
        x, y = _dot(view(image, ("crop",), seed))
        assert 60 - 18 < x < 60 / 0.85 + 18
        bright = view(image, ("brightness",), seed)
        assert 0.85 * 255 - 1 < bright.max() <= 255


def _dot(pixels):
    mass = pixels[0].double()
    axis = torch.arange(201, dtype=torch.float64) - 100
    return float((mass.sum(0) * axis).sum() / mass.sum()), float(
        (mass.sum(1) * axis).sum() / mass.sum()
    )
