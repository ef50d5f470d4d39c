"""What the makefile needs beside the product: a bill of materials, and an audit of it.

Way in: `make sbom`, `make audit`. Nothing here is imported by the product, or asks the network.
"""
