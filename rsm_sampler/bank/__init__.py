"""From a target to weighted clean points."""
