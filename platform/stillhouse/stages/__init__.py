"""What a recipe is made of: stages, the artifacts they hand on, the runner that resumes them."""
