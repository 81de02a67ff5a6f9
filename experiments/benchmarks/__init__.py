"""One module a benchmark, each with ``run(options) -> Result``; the command finds them here."""
