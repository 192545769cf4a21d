"""Recipes: what a run shall do, read, checked and carried out."""
