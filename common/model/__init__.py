"""The network that all sites share: backbones, weights, the split, images.

The way in is `network.assemble`. Nothing here trains, or knows a patient.
"""
