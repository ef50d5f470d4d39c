"""The process that connects out to a coordinator and answers its messages.

The way in is `node`. Nothing here listens on a port.
"""
