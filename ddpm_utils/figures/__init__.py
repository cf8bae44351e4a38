"""Drawings that belong to one lesson, one module per lesson.

They keep matplotlib out of the lessons. What every lesson uses (grids, strips, GIFs) is in `plots`.
"""
