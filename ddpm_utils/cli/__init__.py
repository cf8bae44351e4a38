"""The commands behind `python -m ddpm_utils`: each module holds one, and loads what is heavy only
when it is run.
"""
