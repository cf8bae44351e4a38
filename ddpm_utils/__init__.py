"""The code that the lessons of *DDPM from scratch* build, module by module.

Importing the package does not access the disk and prints nothing.
"""

__version__ = "0.1.0"
