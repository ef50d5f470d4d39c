"""What has left this site, and the only way out: reserve, seal, send.

The way in is `outbox.release`. No line is ever changed or deleted.
"""
