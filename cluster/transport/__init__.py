"""What crosses the network: updates and models as real bytes, and who holds which mask."""
