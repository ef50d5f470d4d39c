"""Virtual hospitals: from folders, from a pool that is cut, or made up.

The way in is `virtual_sites`. No image of a real patient is ever written.
"""
