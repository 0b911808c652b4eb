"""The parts of the build backend."""
