"""Sources of uint8 image batches."""

from pdfast.data.codec import PIXELS, Codec, codec_of
from pdfast.data.load import DIGITS_SHAPE, check_shape, load_source
from pdfast.data.source import Batch, ImageSource, LoaderName, ResidentImages

__all__ = [
    "DIGITS_SHAPE",
    "PIXELS",
    "Batch",
    "Codec",
    "ImageSource",
    "LoaderName",
    "ResidentImages",
    "check_shape",
    "codec_of",
    "load_source",
]
