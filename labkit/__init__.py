"""labkit: the small package under One-GPU Lab (models, trainers, measurements, and what makes it a course).

Rooms, ground floor first; each imports only rooms named before it:
kernels, models, data, tasks, objectives, measure, trainers, pipeline, course, cli.
The three files beside this one (errors, files, progress) are the foundation that every room may use.
"""

__version__ = "0.1.0"
