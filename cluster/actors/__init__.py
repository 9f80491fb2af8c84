"""Ray: the actors, where they are placed, rounds on them, and the driver as an actor on a cluster."""
