"""A hospital's own page of a study that has ended here: every figure in full, for the hospital.

The way in is `page.write_page`. Nothing of it leaves: what was told is the ledger's to say.
"""
