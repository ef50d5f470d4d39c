"""The coordinator: joins sites, runs the rounds, keeps the run folder."""
