"""What a client does: local training and its steps, evaluation, folding what it sent, its share of a GPU."""
