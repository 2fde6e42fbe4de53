"""The command that fills a folder with latents and text embeddings before a training."""
