"""Fine-tuning of a checkpoint on examples: reading and checking them, LoRA, the loop, the result.

Reading and checking load no torch, so that bad data is refused at once. `run.tune` does it all.
"""
