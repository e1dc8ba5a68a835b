"""Updates that cannot poison: bounds, robust centres, and the attacks to try them with."""
