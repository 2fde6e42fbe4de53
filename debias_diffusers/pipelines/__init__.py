"""Solvers (diffusers schedulers) and the diffusers pipeline for pixel UNets."""
