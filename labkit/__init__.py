"""labkit: the small package under One-GPU Lab (models, trainers, measurements, and what makes it a course).

Rooms, ground floor first; each imports only rooms named before it:
kernels, models, data, tasks, objectives, measure, trainers, pipeline, course, cli.
The files beside this one (errors, files, progress, allocator, toolchain) are the foundation that every room may use;
install is what `make install` runs before anything is there.
"""

__version__ = "0.1.0"
