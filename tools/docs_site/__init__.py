"""What builds the site of the docs: `make docs`."""
