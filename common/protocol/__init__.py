"""The messages between server and sites, and how coarse their numbers are.

The way in is `wire`. Nothing that is not spelled here is sent or read.
"""
