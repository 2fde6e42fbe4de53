"""Analysis: what a loss weight changes, by timestep and over the steps of a solver, and its report."""
