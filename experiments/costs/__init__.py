"""What the methods of the papers cost, in seconds that are taken in turns."""
