"""Untrusted bytes to pixels: PNG and JPEG alone, and never more pixels than allowed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# The limit of `read_picture` is checked first, on the header; pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = None

_FORMATS = ("PNG", "JPEG")


class PictureError(Exception):
    """The bytes are no picture that is served.

    Args:
        status: HTTP status that says of what kind the fault is.
        reason: One sentence for the client.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def read_picture(content: bytes, *, size: tuple[int, int] | None, max_pixels: int) -> np.ndarray:
    """Decode one picture, upright, in colour.

    Args:
        content: The file as it was sent.
        size: (height, width) to fit it to: short side resized, centre cropped, as in training. Left as it is where
            None.
        max_pixels: Largest width times height. A file of a few kilobytes can hold a picture of gigabytes.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        PictureError: 415 where it is neither PNG nor JPEG, 413 where it is too large, 400 where it is damaged.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise PictureError(415, "the body is neither a PNG nor a JPEG file") from None
    except Exception as error:  # whatever a decoder raises is about the file
        raise PictureError(400, f"the picture is damaged ({_first_line(error)})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(413, f"the picture has {width}x{height} pixels; at most {max_pixels} are accepted")
    try:
        with image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to white
                upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            colour = upright.convert("RGB")
            if size is not None:
                colour = ImageOps.fit(colour, size[::-1], Image.Resampling.BILINEAR)
    except Exception as error:
        raise PictureError(400, f"the picture is damaged ({_first_line(error)})") from error
    return np.asarray(colour)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
