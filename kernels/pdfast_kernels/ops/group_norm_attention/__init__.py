"""A whole attention block of images."""
