"""Sources of uint8 image batches."""

from pdfast.data.load import DIGITS_SHAPE, check_shape, load_source
from pdfast.data.source import Batch, ImageSource, LoaderName, ResidentImages

__all__ = ["DIGITS_SHAPE", "Batch", "ImageSource", "LoaderName", "ResidentImages", "check_shape", "load_source"]
