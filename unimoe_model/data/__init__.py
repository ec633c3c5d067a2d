"""Reading, encoding, caching and mixing of media and conversations."""
