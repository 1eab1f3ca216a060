"""Pre-training of the bundled model: tokenizer, packed data, model, optimisers, trainer, export."""
