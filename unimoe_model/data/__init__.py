"""Real data of the demo, from pip packages, and the cache of its frozen features."""
