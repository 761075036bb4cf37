"""What makes it a course: scale, predictions, exercises, figures, widgets, the claims ledger, the runner.

A notebook imports from here: `from labkit.course import Lab, choice, figures, slider`.
"""

from labkit.course.lab import Lab
from labkit.course.widgets import choice, slider

__all__ = ["Lab", "choice", "slider"]
