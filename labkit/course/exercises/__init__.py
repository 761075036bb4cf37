"""The exercises of each notebook: nb00.py, nb02.py, ... each with CHECKS, a dict from "02.1" to a Check."""
