"""Writers of pipelines that other programs read."""
