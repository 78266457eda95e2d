"""Classical Monte Carlo; it knows no diffusion."""
