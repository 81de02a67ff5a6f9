"""What is left after unlearning: TOFU, attacks, and their statistics."""
