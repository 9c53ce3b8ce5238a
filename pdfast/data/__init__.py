"""Sources of uint8 image batches."""

from pdfast.data.load import load_source
from pdfast.data.source import Batch, ImageSource, LoaderName, ResidentImages

__all__ = ["Batch", "ImageSource", "LoaderName", "ResidentImages", "load_source"]
