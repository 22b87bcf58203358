"""What generative models of noise share: paths, time samplers, guidance, solvers, tangents."""
