"""What the user brings: the energy, its coordinates, contexts and gradients."""
