"""Accuracy on every validation image exactly once: of a phase's trainees, a run, a weights file, an export."""
