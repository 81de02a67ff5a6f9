"""Every claim of the seven abstracts, the runs that decide it, and a verdict that can fail."""
