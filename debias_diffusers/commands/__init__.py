"""The commands: their arguments to a configuration, what is wrong with it, and then the work. They import torch only for the work."""
