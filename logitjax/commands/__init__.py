"""What a user runs on their own model and data."""
