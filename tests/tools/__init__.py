"""The scripts in tools/, and what make and CI run."""
