"""The parts that the five scripts assemble; importing this package imports nothing heavy."""

__version__ = "0.1.0"
