"""The parts of tools/train_lm.py: data, model, checkpoints and plots."""
