"""What the Triton kernels of several operators share; needs triton, so it is imported lazily."""
