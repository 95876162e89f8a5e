"""Pipelines on the Hugging Face hub: what is sent, its model card, and sending it."""
