"""What a finished run shows, for people: the report as one page, and the model's card.

The way in is `report.write_report`. No site is asked here: all of it is read from the run folder.
"""
