"""The coordinator's folder, its authority and its certificate.

The way in is `Project`. No key in it ever leaves this machine.
"""
