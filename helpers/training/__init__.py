"""Training: one loop for every model of the family, and what keeps its features alive."""

from helpers.training.loop import SCHEDULES, Fit, Fresh, Recipe, Run, Shuffled, Stream, fit

__all__ = ["SCHEDULES", "Fit", "Fresh", "Recipe", "Run", "Shuffled", "Stream", "fit"]
