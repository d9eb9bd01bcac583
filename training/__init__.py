"""Makes rewritten programs good: losses, distillation, phases, calibration."""
