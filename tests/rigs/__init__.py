"""Rigs that harden: one module each, with ``run(options) -> Result``; the command finds them."""
