"""The messages between server and sites, one file each, and how coarse their numbers are.

The way in is the message: `join`, `round`, `final`, `ledger`, `backbone`. Nothing that `fields`
does not spell is sent or read.
"""
