"""What becomes of a study's models at a site: the released one is kept, fitted, and attacked.

The ways in are `own.finish`, at the end of a study, and later `own.fit_later` and
`membership.attack_membership`. Nothing of it leaves but the counts that were agreed.
"""
