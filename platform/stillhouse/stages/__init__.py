"""What a recipe is made of: stages, the artifacts they hand on, and the runner that resumes them."""
