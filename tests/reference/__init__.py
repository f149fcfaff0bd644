"""The reference backend, against the oracle and by its own rules."""
