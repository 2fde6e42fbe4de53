"""The mathematics, on tensors alone: noise schedules, loss weights, timestep samplers, the variational bound, the loss."""
