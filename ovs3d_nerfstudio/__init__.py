"""Weakly supervised, open-vocabulary 3D segmentation (3D-OVS) for nerfstudio."""

__version__ = "0.2.0"
