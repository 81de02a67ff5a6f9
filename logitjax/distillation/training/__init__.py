"""Training a student: its text, what teachers say of it, the loop, and the model to hand on."""
