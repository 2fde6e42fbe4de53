"""The Hugging Face Hub: client, model card, publishing. No torch."""
