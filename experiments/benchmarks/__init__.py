"""One module a benchmark, each with ``run(options) -> Result``; ``python -m experiments.benchmark`` finds them."""
