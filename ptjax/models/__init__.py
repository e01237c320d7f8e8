"""What belongs to weights: decoders, their layouts and caches, and the way in and out."""
