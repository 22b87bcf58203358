"""Tasks: exercises with a worked answer and, where there is one, a verifier of answers."""
