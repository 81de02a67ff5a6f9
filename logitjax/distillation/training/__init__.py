"""Training of a student: its text, teachers' output on it, the loop, and the finished model."""
