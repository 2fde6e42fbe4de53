"""Solvers and the diffusers pipeline that draws pixels with them."""
