"""From the content of an image file to pixels."""

import io

import numpy as np

FORMATS = ("PNG", "JPEG")
"""Pillow would run other programs for some of the formats it knows."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images; few-shot code uses them for all natural images."""


def decode(data: bytes, size: int, mode: str = "RGB", upright: bool = False) -> np.ndarray:
    """Pixels of a PNG or JPEG, the whole image resized to a square by a Lanczos filter.

    1-bit and grey images become colours without hue and the reverse, grey of 16 bits is scaled to
    8, CMYK is converted without a profile, what is transparent lies on white.

    Args:
      data: Content of the file.
      size: Height and width of the result.
      mode: "RGB", or "L" for grey.
      upright: Whether to turn it as the camera says it was held (EXIF).

    Returns:
      uint8 `[size, size, 3 or 1]`.

    Raises:
      ValueError: Neither PNG nor JPEG, or a PNG with 16 bits of each of several channels.
      OSError, SyntaxError: Damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("its content is neither PNG nor JPEG") from error
    # Pillow would cut them off. A PNG begins with its header: bits, and what kinds of channel.
    if image.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6):
        raise ValueError("it has 16 bits per channel; save it with 8")
    with image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut them off
            values = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        # A 1-bit image must be made grey before it is resized, or Pillow takes nearest neighbours.
        image = image.convert(mode).resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(size, size, -1)


def encode(pixels: np.ndarray) -> bytes:
    """The PNG of uint8 `[h, w, 3]`."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
