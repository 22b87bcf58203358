"""Few-step generators: students of diffusion and flow models that need one to four calls."""
