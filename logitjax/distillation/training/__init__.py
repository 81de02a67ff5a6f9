"""Training a student: its text, the teachers' output on it, the loop, and the final model."""
