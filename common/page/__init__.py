"""A page of evidence: one HTML file that loads nothing, for people to read and to print.

The way in is `render.render_page`. A page is made of blocks. Only this room writes HTML.
"""
