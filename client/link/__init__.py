"""The process that connects out to coordinators and answers their messages.

The way in is `node`. Nothing here listens on a port.
"""
