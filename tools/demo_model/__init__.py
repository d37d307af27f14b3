"""Parts of the program that trains the small demonstration model."""
