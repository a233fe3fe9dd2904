"""Photographs: decoded by Pillow, as CLIP's preprocessing has it, and stood upright by their EXIF data."""

import contextlib

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError

from vlab_jax.data.limits import DecodeError, MediaLimits
from vlab_jax.data.media import Encoded, as_file, head

# How files of photographs begin.
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"

# How EXIF's eight orientations are shown, as `upright` takes it, and the number of EXIF's field.
_EXIF_ORIENTATION = 0x0112
EXIF_ORIENTATIONS = {
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, 1), (-1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}


def decode_still(media: Encoded, limits: MediaLimits) -> UInt8[np.ndarray, "h w 3"] | None:
    """A photograph, upright, by the decoder that CLIP's preprocessing has; None where the media is none.

    FFmpeg spreads a JPEG's colours over the pixels by another filter, which is off by up to 40 of 255 at edges.
    """
    begins = head(media, 12)
    if not (begins.startswith((_JPEG, _PNG)) or (begins.startswith(b"RIFF") and begins[8:12] == b"WEBP")):
        return None
    with _opened(media) as image:
        if getattr(image, "n_frames", 1) > 1 and not begins.startswith(_JPEG):  # animated
            return None
        limits.check_picture(*image.size)
        orientation = np.array(EXIF_ORIENTATIONS[exif_orientation(image) or 1])
        return np.ascontiguousarray(upright(np.asarray(image.convert("RGB")), orientation))


def upright(frame: UInt8[np.ndarray, "h w 3"], orientation: Int[np.ndarray, "2 2"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The frame turned and mirrored as its display matrix says.

    A pixel at (x, y) is shown at (x, y) @ `orientation`, whose entries are -1, 0 and 1: quarter turns and
    mirrors.
    """
    (a, b), (c, d) = orientation.tolist()
    if a == 0:  # x and y change places
        frame, flip_x, flip_y = frame.swapaxes(0, 1), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return frame[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def is_upright_jpeg(media: Encoded, short_side: int) -> bool:
    """Whether the media is a JPEG that stands upright as stored, with a short side of at most so many pixels."""
    if head(media, len(_JPEG)) != _JPEG:
        return False
    with Image.open(as_file(media)) as image:
        return (exif_orientation(image) or 1) == 1 and min(image.size) <= short_side


def exif_orientation(image: Image.Image) -> int | None:
    """EXIF's number of an image's orientation, where it can be read."""
    with contextlib.suppress(Exception):  # whatever Pillow makes of damaged metadata
        number = image.getexif().get(_EXIF_ORIENTATION)
        return number if number in EXIF_ORIENTATIONS else None
    return None


def exif_rotation(media: Encoded) -> int:
    """The counterclockwise angle by which EXIF turns an image, in degrees; a mirror image counts as not turned."""
    with _opened(media) as image:
        return {3: 180, 6: -90, 8: 90}.get(exif_orientation(image) or 1, 0)


def _opened(media: Encoded) -> Image.Image:
    try:
        return Image.open(as_file(media))
    except UnidentifiedImageError as error:  # its message has an address of the memory in it
        raise DecodeError("the media begins like an image and cannot be read as one") from error
