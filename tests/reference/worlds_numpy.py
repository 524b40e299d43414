"""What is known of a world in closed form."""


def expected(world):
    """E[x] = constant + Σ_j r_j a_j, since magnitudes have mean 1."""
    return world.constant + world.rates.to(world.atoms.dtype) @ world.atoms
