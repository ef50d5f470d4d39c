"""All that Consilium uses of flwr beyond its public names, each name with its reason.

The way in is the file of a concern: `compat` (which flwr), `messages`, `supernode`, `database`,
`routes`, `strategies`, `simulation`. Nothing here knows a study, a site or a model.
"""
