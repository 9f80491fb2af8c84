"""What a run leaves: its folder, checkpoints, pictures, and its entry in MLflow."""
