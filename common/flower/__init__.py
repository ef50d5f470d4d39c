"""Flower's private names, and messages in pieces.

The way in is `compat`. No other package may use a private name of flwr without `pinned()`.
"""
