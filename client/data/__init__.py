"""A hospital's images, in whatever format they are kept."""
