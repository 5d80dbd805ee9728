"""MasKD on two real tasks: street scenes (CamVid, segmentation) and blood cells (BCCD, detection)."""

EXTRA = "pip install '.[real]'"
