"""The one exception that a learner is meant to read: a sentence that says what is wrong and what to do.

Anything a user can cause (a bad setting, a missing file, a half-written checkpoint) raises `LabError`.
The command line prints its sentence and exits with status 1; a notebook shows the sentence without a
traceback. Every other exception is a defect of ours and keeps its full traceback.
"""


class LabError(Exception):
    """What went wrong, in one sentence, and the fix, in another."""

    def __init__(self, problem: str, fix: str):
        super().__init__(f"{problem} {fix}")
        self.problem, self.fix = problem, fix

    def __reduce__(self) -> tuple:
        """A worker process sends its exception by pickle, which would call LabError with the joined text alone."""
        return type(self), (self.problem, self.fix)

    def _render_traceback_(self) -> list[str]:
        """IPython calls this instead of printing a traceback."""
        return [f"LabError: {self.problem}", f"  To mend it: {self.fix}"]
