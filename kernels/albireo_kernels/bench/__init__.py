"""``python -m albireo_kernels.bench``: what the machine can do, and how much of it each compiled kernel uses."""
