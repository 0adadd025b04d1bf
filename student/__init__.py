"""Distillation of a small student, weight averaging, model.pt."""
