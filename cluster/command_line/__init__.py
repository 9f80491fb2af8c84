"""What a person types and sees: arguments, help, descriptions, live progress, profiles."""
