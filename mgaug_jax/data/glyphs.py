"""`glyphs`: letters of many scripts from the DejaVu faces that matplotlib ships, bent by hand-like
distortions. It needs no download and is about as hard as Omniglot.

Everything random comes from NumPy's PCG64 on the host: the letters do not depend on the accelerator
or on JAX's settings.
"""

import unicodedata
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mgaug_jax.data import pixels
from mgaug_jax.data.record import Dataset, Decoded, Progress

SCRIPTS = {
    "test": ("GEORGIAN", "ARMENIAN", "HEBREW", "TIFINAGH", "LAO", "NKO", "OLD"),
    "val": ("ARABIC", "GREEK", "COPTIC"),
    "train": ("CANADIAN", "LATIN", "CYRILLIC", "OGHAM", "LISU"),
}
"""Scripts by the first word of their letters' Unicode names; OLD is Old Italic. The order decides
which of two like letters stays: the small scripts come first."""

FACES = (
    "Sans",
    "Serif",
    "SansMono-Oblique",
    "Sans-Bold",
    "Serif-Italic",
    "Sans-Oblique",
    "SansMono",
    "Serif-Bold",
    "Sans-BoldOblique",
    "Serif-BoldItalic",
    "SansMono-Bold",
    "SansMono-BoldOblique",
)


class Glyphs(NamedTuple):
    """What the letters depend on. Lengths are fractions of the frame, angles radians.

    Attributes:
      seed: Of the distortions.
      instances: M, images per letter.
      size: Side of an image.
      alike: Two letters whose blurred drawings correlate this much are one; the second goes.
      kin: A face is used for a letter if its drawing correlates this much with the first face's:
        some faces give old letters another shape.
      extent: Longer side of a letter before it is distorted.
      rotation, shear, scale, shift: Standard deviations of the affine part (scale: of its log,
        per axis).
      bend: Standard deviation of the lowest frequency of the elastic part.
      weight: Range of the ink level that becomes the middle of a stroke's edge; lower is thicker.
    """

    seed: int = 0
    instances: int = 20
    size: int = 28
    alike: float = 0.88
    kin: float = 0.65
    extent: float = 0.60
    rotation: float = 0.14
    shear: float = 0.14
    scale: float = 0.10
    shift: float = 0.03
    bend: float = 0.039
    weight: tuple[float, float] = (0.2, 0.5)


def script(letter: str) -> str:
    """First word of the letter's Unicode name."""
    return unicodedata.name(letter, "?").split()[0]


def _faces() -> dict[str, tuple[Path, frozenset[str]]]:
    """File and letters of every face, in the order of `FACES`."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"glyphs draws with the DejaVu fonts of matplotlib, but this matplotlib came without "
            f"{folder}; install matplotlib from PyPI."
        )
    paths = {face: folder / f"DejaVu{face}.ttf" for face in FACES}
    return {
        face: (path, frozenset(map(chr, FT2Font(str(path)).get_charmap())))
        for face, path in paths.items()
    }


def _draw(letter: str, font, side: int, extent: float, fill: bool = False) -> np.ndarray:
    """The letter's bounding box, scaled and centred: float32 `[side, side]` in [0, 1].

    With `fill`, boxes that are not very narrow or flat become squares. A letter without ink is 0.
    """
    from PIL import Image, ImageDraw

    canvas, frame = Image.new("L", (256, 256)), Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text((64, 64), letter, fill=255, font=font)
    box = canvas.getbbox()
    if box is not None:
        ink = canvas.crop(box)
        longest, shape = max(ink.size), ink.size
        if fill and min(shape) > 0.4 * longest:
            shape = (longest, longest)
        factor = extent * side / longest
        width, height = (max(1, round(length * factor)) for length in shape)
        ink = ink.resize((width, height), Image.Resampling.LANCZOS)
        frame.paste(ink, ((side - width) // 2, (side - height) // 2))
    return np.asarray(frame, np.float32) / 255


def _features(drawings: np.ndarray) -> np.ndarray:
    """Blurred drawings `[n, s, s]` as unit vectors `[n, s s]`: their products are correlations."""
    side = drawings.shape[1]
    distance = np.subtract.outer(np.arange(side), np.arange(side))
    blur = np.exp(-((distance / (0.054 * side)) ** 2) / 2).astype(np.float32)
    flat = (blur @ drawings @ blur.T).reshape(len(drawings), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _distinct(drawings: np.ndarray, alike: float) -> list[int]:
    """Indices of the drawings `[n, s, s]` that are like none kept before them."""
    features = _features(drawings)
    correlation = features @ features.T
    kept: list[int] = []
    for i in range(len(correlation)):
        if not np.any(correlation[i, kept] >= alike):
            kept.append(i)
    return kept


def _letters(params: Glyphs, faces: dict) -> tuple[list[str], int]:
    """The letters of all scripts, and how many were removed because they look like another.

    Accented letters, ligatures and presentation forms (all that Unicode decomposes) are no
    candidates.
    """
    from PIL import ImageFont

    order = [name for names in SCRIPTS.values() for name in names]
    path, has = faces["Sans"]
    candidates = sorted(
        (
            letter
            for letter in has
            if unicodedata.category(letter)[0] == "L"
            and unicodedata.normalize("NFKD", letter) == letter
            and script(letter) in order
        ),
        key=lambda letter: (order.index(script(letter)), letter),
    )
    font = ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC)
    drawings = np.stack([_draw(letter, font, 28, 0.72, fill=True) for letter in candidates])
    inked = np.flatnonzero(drawings.max(axis=(1, 2)) > 0.5)
    kept = inked[_distinct(drawings[inked], params.alike)]
    return [candidates[i] for i in kept], len(inked) - len(kept)


def _warp(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear samples of `images [n, s, s]` at `rows`, `columns` `[n, ...]`; 0 outside."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    top = images.shape[1] + 0.999  # floor + 1 must stay inside the padded image
    rows, columns = (np.clip(x + 1, 0, top) for x in (rows, columns))
    i, j = rows.astype(np.int32), columns.astype(np.int32)
    down, right = rows - i, columns - j
    n = np.arange(len(images)).reshape(-1, *[1] * (rows.ndim - 1))
    return (1 - down) * ((1 - right) * padded[n, i, j] + right * padded[n, i, j + 1]) + down * (
        (1 - right) * padded[n, i + 1, j] + right * padded[n, i + 1, j + 1]
    )


def _distort(rng: np.random.Generator, images: np.ndarray, params: Glyphs) -> np.ndarray:
    """Every image `[n, 2 size, 2 size]` moved, bent and re-inked: uint8 `[n, size, size]`."""
    n, side, _ = images.shape
    normal = lambda *shape: rng.standard_normal((n, *shape), np.float32)

    angle = params.rotation * normal()
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.zeros((n, 2, 2)) + np.eye(2)
    slant[:, 1, 0] = params.shear * normal()
    matrix = (np.moveaxis(turn, -1, 0) @ slant) * np.exp(params.scale * normal(2, 1))
    grid = np.stack(np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 2, indexing="ij"))
    moved = np.einsum("nab,bij->naij", matrix, grid) + side * params.shift * normal(2, 1, 1)

    # A smooth field: few cosines per axis, the higher the weaker.
    waves = np.cos(np.pi / side * np.outer(np.arange(side) + 0.5, np.arange(4)))
    decay = params.bend * side / (1 + np.add.outer(np.arange(4) ** 2, np.arange(4) ** 2))
    moved += waves @ (decay * normal(2, 4, 4)) @ waves.T

    ink = _warp(images, *np.moveaxis(moved + (side - 1) / 2, 1, 0))
    ink = ink.reshape(n, params.size, 2, params.size, 2).mean(axis=(2, 4))
    level = rng.uniform(*params.weight, (n, 1, 1))
    return np.round(255 * np.clip((ink - level) / 0.4 + 0.5, 0, 1)).astype(np.uint8)


def render(split: str, params: Glyphs, progress: Progress) -> Decoded:
    """Draws the letters of one split."""
    from PIL import ImageFont

    faces = _faces()
    letters, removed = _letters(params, faces)
    letters = [letter for letter in letters if script(letter) in SCRIPTS[split]]
    progress(
        f"glyphs: drawing {len(letters)} letters x {params.instances} for {split} "
        f"({removed} letters of all scripts look like another and are left out)"
    )
    fonts = {
        face: ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC)
        for face, (path, _) in faces.items()
    }
    drawn = []
    for letter in letters:
        drawings = np.stack(
            [
                _draw(letter, fonts[face], 2 * params.size, params.extent)
                for face, (_, has) in faces.items()
                if letter in has
            ]
        )
        features = _features(drawings)
        drawings = drawings[features @ features[0] >= params.kin]
        instances = drawings[np.arange(params.instances) % len(drawings)]
        rng = np.random.Generator(np.random.PCG64([params.seed, ord(letter)]))
        drawn.append(_distort(rng, instances, params))
    return Decoded(
        np.stack(drawn)[..., None],
        np.full(len(letters), params.instances, np.int32),
        tuple(unicodedata.name(letter) for letter in letters),
    )


def dataset(params: Glyphs) -> Dataset:
    """The data set of these parameters."""
    return Dataset(
        # The versions stand for the font files and for the arithmetic that draws them.
        parameters={"scripts": SCRIPTS, "faces": FACES, **params._asdict()},
        fingerprint=lambda split, data_dir: {
            name: version(name) for name in ("matplotlib", "pillow", "numpy")
        },
        build=lambda split, data_dir, scratch, progress: render(split, params, progress),
        # Of dark letters on light paper; here ink is 255.
        decode=lambda data: 255 - pixels.decode(data, params.size, "L"),
        source="drawn on first use with the DejaVu faces that matplotlib ships",
    )
