"""Sources of uint8 image batches."""

from pdfast.data.source import Batch, ImageSource, ResidentImages, load_source

__all__ = ["Batch", "ImageSource", "ResidentImages", "load_source"]
