"""The rounds of a run: whom the server asks, what it takes in, what it measures and writes down."""
