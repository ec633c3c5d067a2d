"""Benchmarks; README.md describes how to run and read them."""
