"""Decode one image to pixels as a viewer shows it. Decoding processes import this module alone, so PyTorch is not needed.

A viewer shows transparent ground as white, turns a photograph as its EXIF orientation says, shows the first frame of an
animation, and brings numbers of any type and depth to the range of a screen.
"""

import contextlib
import hashlib
import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

# Pillow would hand some other formats, such as EPS, to a program that runs them: only pictures of pixels are tried.
RASTER_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF"),
    *("PPM", "TGA", "AVIF", "JPEG2000", "PCX", "ICO", "SGI"),
)
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # errors are raised as well, and told in one line
NUMBERS = ("I", "F")  # Pillow's modes of 32-bit numbers


class Decoded(NamedTuple):
    """What became of one image: its pixels, uint8 (S, S, C), or an error; a note where the range of values is a guess."""

    pixels: np.ndarray
    error: str
    note: str
    sha1: bytes  # of the content, as it was before decoding


def decode(content, size, mode, banner=0):
    """Decode one image -> Decoded. C = 1 for Omniglot, else 3.

    content: a file's content, or a uint8 array (H, W, 3). size: S, pixels. banner: rows of pixels to cut from the bottom.
    """
    sha1 = hashlib.sha1(content if isinstance(content, bytes) else content.tobytes()).digest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange metadata, which say nothing of the pixels
            image, note = open_image(content)
            image = on_ground(image)
            pixels = finish(image, size, mode, banner)
    except Exception as error:  # noqa: BLE001 (Pillow's decoders raise nearly anything on damaged files)
        return Decoded(None, reason(error), "", sha1)
    return Decoded(pixels, "", note, sha1)


def reason(error):
    """Say in words of a user why an image cannot be decoded."""
    text = str(error) or type(error).__name__
    if "cannot identify image file" in text:
        return "it is no image in a format that is read here"
    return text


def open_image(content):
    """Open an image, upright and of 8 bits -> the image, and a note if the range of its values is a guess."""
    if not isinstance(content, bytes):
        return Image.fromarray(content), ""
    Image.init()
    formats = [name for name in RASTER_FORMATS if name in Image.OPEN]
    image = Image.open(io.BytesIO(content), formats=formats)
    note = ""
    image.load()  # the first frame
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in NUMBERS:
        image, note = from_numbers(image)
    with contextlib.suppress(Exception):  # damaged metadata; the pixels stand
        image = ImageOps.exif_transpose(image)
    return image, note


def from_numbers(image):
    """Bring an image of 32-bit numbers to 8 bits -> the image, and how: such files do not say what their white is."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not a number")
    low, high = values.min(), values.max()
    white = {"I": (255, 65535), "F": (1, 255, 65535)}[image.mode]
    white = next((limit for limit in white if low >= 0 and high <= limit), None)
    if white is None:
        scaled = (values - low) / max(high - low, 1e-30)
        note = "from their smallest to their largest, each image by itself"
    else:
        scaled = values / white
        note = f"from 0 to {white}"
    return Image.fromarray(np.rint(255 * scaled).astype(np.uint8)), f"32-bit numbers are taken {note}"


def on_ground(image):
    """Lay an image with transparency on white ground. A white drawing would vanish there: it gets black ground."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    laid = [Image.new("RGBA", image.size, colour) for colour in ("white", "black")]
    for below in laid:
        below.alpha_composite(image)
    on_white, on_black = (below.convert("RGB") for below in laid)
    return on_black if is_plain(on_white) and not is_plain(on_black) else on_white


def is_plain(image):
    """Whether all pixels of an image have one colour."""
    return all(low == high for low, high in image.getextrema())


def finish(image, size, mode, banner):
    """Cut, resize and convert an image -> uint8 (size, size, C)."""
    image = image.convert("L" if mode == "omniglot" else "RGB")
    if banner:
        image = image.crop((0, 0, image.width, max(1, image.height - banner)))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(size, size, -1)
    return 255 - pixels if mode == "omniglot" else pixels  # ink becomes bright, paper becomes zero


# ------------------------------------------------------------------------------------------ in processes of their own


def decode_all(jobs):
    """Decode some images, in a process of its own -> [Decoded]. jobs: [arguments of `decode`]."""
    return [decode(*job) for job in jobs]


def begin_worker():
    """Prepare a decoding process: Ctrl-C is its parent's affair, and it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent):
    """Wait for the end of a process, and end this one at once."""
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
