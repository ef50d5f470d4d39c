"""Many virtual hospitals on one machine, with the same code as the real ones."""
