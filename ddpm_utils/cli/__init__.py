"""The commands behind `python -m ddpm_utils`, each in a module of its own.

A command's module, and the heavy imports in it, are loaded only when the command runs.
"""
