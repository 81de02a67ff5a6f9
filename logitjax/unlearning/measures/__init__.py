"""What is left after unlearning: benchmarks (TOFU, MUSE, WMDP), attacks, and their statistics."""
